"""Text-image encoders with random weights: CLIP as transformers writes it, and two small networks in ONNX."""

import json
import string
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

SIDE = 16
"""Height and width of what the networks see, in pixels."""
MAX_TOKENS = 12
"""Largest number of tokens of a text: each letter is one, and there are two ends."""
LETTERS = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
VOCABULARY = {token: number for number, token in enumerate([*LETTERS, "<|startoftext|>", "<|endoftext|>"])}
START, END = len(LETTERS), len(LETTERS) + 1


def write_processor(folder: Path, size: int = SIDE, crop: int = SIDE) -> CLIPProcessor:
    """The tokenizer and the preparation of images, as transformers saves them."""
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": crop, "width": crop})
    processor = CLIPProcessor(images, CLIPTokenizer(vocab=VOCABULARY, merges=[]))
    processor.save_pretrained(folder)
    return processor


def write_clip(folder: Path, seed: int = 0, size: int = SIDE) -> CLIPModel:
    """CLIP with random weights, and its processor, in one folder."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    text = {**small, **ends, "vocab_size": len(VOCABULARY), "max_position_embeddings": MAX_TOKENS}
    vision = {**small, "image_size": SIDE, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    write_processor(folder, size)
    return model


def write_onnx(
    folder: Path, length: int | str = "L", mask: bool = False, knows_colours: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Two linear networks: of an image's mean colour (3, D), and of each token (V, D), of which the sum is taken.

    With random weights, or such that red, green and blue mean the same in images and in texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_processor(folder)
    random = np.random.default_rng(0)
    colours, words = (random.normal(size=(rows, 4)).astype(np.float32) for rows in (3, len(VOCABULARY)))
    if knows_colours:
        colours, words = np.eye(3, 4, dtype=np.float32), np.zeros_like(words)
        for number, letter in enumerate(("d</w>", "n</w>", "b")):  # in red, green and blue, and not in square
            words[VOCABULARY[letter], number] = 1
    float32, int64 = TensorProto.FLOAT, TensorProto.INT64

    def save(name: str, nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], weights: np.ndarray) -> None:
        output = "image_embeds" if name.startswith("vision") else "text_embeds"
        output_info = helper.make_tensor_value_info(output, float32, ["N", 4])
        graph = helper.make_graph(nodes, name, inputs, [output_info], [numpy_helper.from_array(weights, "weights")])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, folder / f"{name}.onnx")

    pixels = helper.make_tensor_value_info("pixel_values", float32, ["N", 3, SIDE, SIDE])
    mean = helper.make_node("ReduceMean", ["pixel_values"], ["mean"], axes=[2, 3], keepdims=0)
    save("vision_model", [mean, helper.make_node("MatMul", ["mean", "weights"], ["image_embeds"])], [pixels], colours)
    tokens = [helper.make_tensor_value_info("input_ids", int64, ["N", length])]
    nodes = [helper.make_node("Gather", ["weights", "input_ids"], ["each"])]
    if mask:
        tokens.append(helper.make_tensor_value_info("attention_mask", int64, ["N", length]))
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["float"], to=float32),
            helper.make_node("Unsqueeze", ["float", "last"], ["column"]),
            helper.make_node("Mul", ["each", "column"], ["masked"]),
        ]
        nodes.insert(0, helper.make_node("Constant", [], ["last"], value=numpy_helper.from_array(np.array([2]))))
    nodes.append(helper.make_node("ReduceSum", ["masked" if mask else "each", "one"], ["text_embeds"], keepdims=0))
    nodes.insert(0, helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.array([1]))))
    save("text_model", nodes, tokens, words)
    return colours, words


def rewrite(path: Path, **changes: object) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
