"""Evaluation of one model file: every metric of what it generates, reconstructs and predicts."""

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusion.common.device import resolve_device
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.common.shapes import Images, group_by_shape, height_and_width, shape_name
from diffusion.evaluation.cache import Key, Tensors, load_or_compute, load_or_compute_result
from diffusion.evaluation.features.text_image_encoder import OPTION, TextImageEncoder
from diffusion.evaluation.metrics.copies import detect_duplicates, detect_memorization
from diffusion.evaluation.metrics.frechet import compute_moments, frechet_distance
from diffusion.evaluation.metrics.held_out_loss import (
    HeldOutLoss,
    conditioning_of_rows,
    measure_losses,
    summarize_losses,
)
from diffusion.evaluation.metrics.per_class import LabelledFeatures, PerClass, evaluate_classes
from diffusion.evaluation.metrics.per_shape import PerShape, evaluate_shapes
from diffusion.evaluation.metrics.pixel_metrics import compare_appearance, compare_images, psnr, ssim
from diffusion.evaluation.metrics.scores import Scores
from diffusion.evaluation.metrics.text_image_agreement import (
    Cosines,
    TextImageAgreement,
    compute_cosines,
    number_of_each,
    summarize_agreement,
)
from diffusion.evaluation.model_images import ModelImages, restore_order
from diffusion.evaluation.real_images import CHUNK, SHOWN, appearance_of_pieces, extractor_key, thumbnails_of_pieces
from diffusion.evaluation.results import ModelEvaluation, ModelScores, Reconstruction
from diffusion.families.model import Model
from diffusion.generation.generate import reconstruct_images
from diffusion.process.likelihood import Terms
from diffusion.process.samplers import SamplingConfig


class ModelEvaluator(ModelImages):
    """Lazy evaluation of one model file under an evaluator's conditions; expensive parts are cached."""

    encoder: TextImageEncoder | None = None
    """The encoder that measures text-image agreement, if any."""

    @cached_property
    def scores(self) -> Scores:
        """Return the distances of the generated images to held-out ones."""
        return self.real.scores(self.features_key, self.image_set)

    @cached_property
    def per_shape(self) -> PerShape | None:
        """Return metrics by shape; None for a data set of one shape."""
        real = self.real
        if len(real.dataset.shapes) == 1:
            return None
        reference = real.reference.features
        return evaluate_shapes(self.features, self.shapes, reference, real.shapes(real.compared), real.extractor.name)

    @cached_property
    def per_class(self) -> PerClass | None:
        """Return metrics by class; None for models without classes, or none that the data set has images of."""
        classes, real = self.model.classes, self.real
        if self.labels is None or not real.dataset.manifest.class_histogram.keys() & set(classes):
            return None
        generated = LabelledFeatures(self.features, self.labels)
        return evaluate_classes(
            generated, real.select_labelled_features(classes), real.reader(classes), classes, real.extractor.name
        )

    @cached_property
    def cosines(self) -> tuple[Cosines, Cosines] | str | None:
        """Return cosines of generated and of real images with the prompts; why there are none; None without captions.

        The real images are those that the prompts are captions of.
        """
        if not self.header.model.text:
            return None
        encoder, real = self.encoder, self.real
        if encoder is None:
            return f"set {OPTION}"
        rows = np.array(self._captioned_rows, np.int64)
        captions, prompts = number_of_each([caption or "" for caption in real.dataset.captions(rows)])
        # They are used in turn if there are more images than captions.
        image_prompts = prompts
        if len(prompts):
            places = group_by_shape(real.shapes(rows)) if len(real.dataset.shapes) > 1 else {}
            positions = {}
            for shape, numbers in self._numbers.items():
                shape_places = places.get(shape, range(len(rows)))
                positions[shape] = [shape_places[number % len(shape_places)] for number in range(len(numbers))]
            image_prompts = prompts[torch.tensor(self._merge(positions))]
        if len(set(image_prompts.tolist())) < 2:
            return "the images have fewer than two different prompts: ingest captions"
        key: Key = extractor_key(encoder)
        texts_key: Key = {"kind": "embeddings of texts", "format_version": 1, "texts": digest_of(captions)} | key
        texts = load_or_compute(self.folder, texts_key, lambda: {"texts": encoder.embed(captions)})["texts"]
        images_key: Key = {"kind": "embeddings of generated images", "format_version": 1} | key
        images_key["generated"] = self.generated_key
        images = load_or_compute(self.folder, images_key, lambda: {"images": encoder(self.images)})["images"]
        real_embeddings = real.features(rows, extractor=encoder)
        if len(widths := {texts.shape[1], images.shape[1]}) > 1:
            raise UserError(
                f"{OPTION} = {encoder.folder} embeds images and texts in {widths} dimensions: use one model"
            )
        return compute_cosines(images, texts, image_prompts), compute_cosines(real_embeddings, texts, prompts)

    @property
    def text_image_agreement(self) -> TextImageAgreement | str | None:
        """Return the agreement of images with their prompts, or why it is not measured; None without captions."""
        cosines, encoder = self.cosines, self.encoder
        if isinstance(cosines, tuple):
            assert encoder is not None
            return summarize_agreement(encoder.name, *cosines)
        return cosines

    @cached_property
    def held_out_loss(self) -> HeldOutLoss:
        """Return the loss on as many held-out images as are generated."""
        rows = self.real.held_out[: self.config.samples]

        def work() -> Tensors:
            dataset = self.real.dataset
            chunks = (
                part[start : start + CHUNK]
                for part in dataset.split_by_bucket(rows)
                for start in range(0, len(part), CHUNK)
            )
            pieces = ((dataset.images(chunk), conditioning_of_rows(self.model, dataset, chunk)) for chunk in chunks)
            terms = measure_losses(self.model, pieces, self.sampling, self.progress)
            bits = {} if terms.bits is None else {"bits": terms.bits}
            return {"edges": terms.edges, "losses": terms.losses, **bits}

        tensors = load_or_compute(self.folder, self._held_out_key("losses", len(rows)), work)
        return summarize_losses(Terms(tensors["edges"], tensors["losses"], tensors.get("bits")))

    @property
    def reconstructed(self) -> Images | None:
        """Return reconstructions of the first held-out images, uint8; None without an autoencoder."""
        batches = [images for name, images in self._reconstruction[1].items() if name.startswith("shown")]
        if len(batches) < 2:
            return next(iter(batches), None)
        shapes = self.real.shapes(self.real.held_out[:SHOWN])
        return restore_order(shapes, {height_and_width(images): images for images in batches})

    @property
    def psnr(self) -> Tensor | None:
        """Return the PSNR in dB of each reconstructed held-out image, (M,); None without an autoencoder."""
        return self._reconstruction[1].get("psnr")

    @cached_property
    def _reconstruction(self) -> tuple[Reconstruction | None, Tensors]:
        """Return the reconstruction metrics of the model's autoencoder with the tensors above, if it has one."""
        if self.header.model.evaluated_by != "reconstructions" and self.header.latents is None:
            return None, {}
        real = self.real
        rows = real.held_out if self.samples >= self.config.samples else real.held_out[: self.samples]

        def work() -> tuple[Reconstruction, Tensors]:
            model = self.model.to(resolve_device(self.sampling.device))
            ratios, ssims, features, examples = list[Tensor](), list[Tensor](), list[Tensor](), dict[str, Tensor]()
            for images in real.read_by_bucket(rows):
                outputs = reconstruct_images(model, images, self.sampling)
                ratios.append(psnr(outputs, images))
                ssims.append(ssim(outputs, images))
                features.append(real.extractor(outputs))
                suffix = "" if len(real.dataset.shapes) == 1 else f"/{shape_name(height_and_width(images))}"
                examples.setdefault(f"shown{suffix}", outputs[:SHOWN])
                self.progress("images reconstructed", sum(map(len, ratios)), len(rows))
            image_psnr = torch.cat(ratios)
            reconstruction = Reconstruction(
                extractor=real.extractor.name,
                images=len(image_psnr),
                psnr=image_psnr.mean().item(),
                psnr_se=image_psnr.std().item() / math.sqrt(len(image_psnr)),
                ssim=torch.cat(ssims).mean().item(),
                fd=frechet_distance(compute_moments(torch.cat(features)), real.reference.moments),
            )
            return reconstruction, {"psnr": image_psnr, **examples}

        key = self._held_out_key("reconstructions", len(rows)) | {"extractor_digest": real.extractor.digest}
        return load_or_compute_result(self.folder, key, Reconstruction, work)

    def compute_model_scores(self) -> ModelScores:
        """Return the metrics that every model has."""
        similarity = None
        if self.header.model.low_resolution is not None:
            real = self.real.dataset.images_in_order(self.real.shown[: self.samples])
            similarity = compare_images(self.images, real)
        return ModelScores(
            sha256=self.sha256,
            family=self.header.model.family,
            images=self.header.images,
            fingerprint=self.fingerprint,
            scores=self.scores,
            reconstruction=self._reconstruction[0],
            similarity=similarity,
            text_image_agreement=self.text_image_agreement,
            per_shape=self.per_shape,
        )

    def evaluate(self) -> ModelEvaluation:
        """Return all metrics, without estimates."""
        real, pieces = self.real, self.pieces()
        flip = bool(self.header.training.get("flip", False))  # then mirrored copies count as well
        nearest = real.neighbours(self.features_key, pieces, self.features, flip)
        rows = real.held_out
        nearest_to_real = real.neighbours(real.key(rows), real.images(rows), real.features(rows), flip)
        return ModelEvaluation(
            **dict(self.compute_model_scores()),
            sampling=self.guided,
            memorization=detect_memorization(nearest, nearest_to_real),
            duplicates=detect_duplicates(thumbnails_of_pieces(pieces), real.thumbnails),
            drift=compare_appearance(appearance_of_pieces(pieces), real.appearance),
            per_class=self.per_class,
            held_out_loss=self.held_out_loss,
            gflop=count_gflop(self.model, self.guided),
        )

    def _held_out_key(self, kind: str, count: int) -> Key:
        """Return the cache key of what is computed of the first ``count`` held-out images."""
        digest = self.real.dataset.manifest.content_digest
        key: Key = {"kind": kind, "format_version": 4, "model": self.digest, "content_digest": digest}
        return key | {"count": count, "fingerprint": self.fingerprint}


def count_gflop(model: Model, config: SamplingConfig) -> float:
    """Count the operations, in 10⁹, of an image's matrix products and convolutions: unlike seconds, always the same."""
    operations = 0
    for times, forward in model.passes(config):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            forward()
        operations += times * counter.get_total_flops()
    return float(operations / 1e9)
