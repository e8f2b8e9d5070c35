"""Networks of which training changes a part: low-rank matrices (LoRA, arXiv 2106.09685), or a pipeline's denoiser.

Low-rank matrices are trained through peft, and merged into the weights to generate.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from diffusion.common.errors import UserError, install_hint
from diffusion.families.lora import LoRAConfig

FACTORS = (".lora_A.weight", ".lora_B.weight")
"""Ends of the names of A and B, behind the name of the adapted layer, as in peft's files."""


class TrainableSubset(nn.Module):
    """A network of which training changes the parameters ``trained`` alone, by their names.

    Its state, and all that ``parameters`` lists, are these; the other weights of ``network`` move between devices with
    them and are otherwise hidden. Calls go to ``network``, which holds the same parameters.
    """

    network: nn.Module

    def __init__(self, network: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        # Past nn.Module, which would register it.
        object.__setattr__(self, "network", network)
        for name, parameter in trained.items():
            module: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what ``network`` computes."""
        return self.network(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of ``network`` as well."""
        self.network.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # In place: the parameters stay the objects that are registered here.
        self.network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def train_parameters(network: nn.Module, names: Iterable[str]) -> TrainableSubset:
    """Freeze a copy of ``network``, which shares its frozen weights, except the parameters ``names``."""
    clone, names = share(network), set(names)
    weights = {name: value.detach().clone() for name, value in network.named_parameters() if name in names}
    clone.load_state_dict(weights, strict=False, assign=True)
    trained = {name: clone.get_parameter(name) for name in weights}
    for parameter in trained.values():
        parameter.requires_grad_()
    return TrainableSubset(clone, trained)


def train_adapters(network: nn.Module, lora: LoRAConfig, layers: Iterable[str]) -> TrainableSubset:
    """Freeze a copy of ``network``, which shares its weights, and add low-rank matrices to its ``layers``.

    A is from torch's random numbers, B of zeros. Raises UserError if peft is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError(f"training.lora needs peft, which is not installed: {install_hint('diffusers')}") from error
    adapter_config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]  # only divided by r
        target_modules=sorted(layers),
    )
    peft.inject_adapter_in_model(adapter_config, clone := share(network))
    factors = {name: parameter for name, parameter in clone.named_parameters() if parameter.requires_grad}
    return TrainableSubset(clone, {name.replace(".default.", "."): parameter for name, parameter in factors.items()})


def select_layers(layers: Iterable[str], targets: Iterable[str] | None, default: Iterable[str]) -> set[str]:
    """Choose the ``layers`` whose names, or ends behind a dot, are among ``targets``, or among the ``default``."""
    names = set()
    for target in default if targets is None else targets:
        matches = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not matches and targets is not None:
            counts = Counter(end for name in layers if not (end := name.rpartition(".")[2]).isdigit())
            ends = sorted(counts, key=lambda end: (-counts[end], end))
            raise UserError(
                f"training.lora.target_modules names {target}, and the network has no such linear or convolutional "
                f"layer: use names such as {', '.join(ends[:12])}"
            )
        names |= matches
    return names


def share(network: nn.Module) -> nn.Module:
    """Copy ``network``, with the same frozen weights in memory."""
    # Copies of what is in the memo are its values.
    memo = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in network.parameters()}
    return copy.deepcopy(network, memo)


def merge_adapters(network: nn.Module, lora: LoRAConfig, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the adapted weights of ``network``, W + α/r · B A, by name.

    ``factors`` are A and B by ``FACTORS``: (r, in) and (out, r) of linear layers, (r, in, k, k) and (out, r, 1, 1) of
    convolutions. Raises ValueError for tensors that do not fit.
    """
    layers, weights = dict(network.named_modules()), {}
    names = {name.removesuffix(suffix) for suffix in FACTORS for name in factors if name.endswith(suffix)}
    if set(factors) != {name + suffix for name in names for suffix in FACTORS}:
        raise ValueError("tensors of no layer")
    for name in sorted(names):
        layer, (a, b) = layers.get(name), (factors[name + suffix] for suffix in FACTORS)
        if layer is None or not is_adaptable(layer):
            raise ValueError(f"no layer {name}")
        weight = layer.weight
        assert isinstance(weight, Tensor)
        kernel = (1,) * (weight.ndim - 2)
        if a.shape != (lora.rank, *weight.shape[1:]) or b.shape != (len(weight), lora.rank, *kernel):
            raise ValueError(f"shape of {name}")
        # In float64: the merged weights depend little on the machine that merged them.
        product = b.flatten(1).double() @ a.flatten(1).double()
        weights[f"{name}.weight"] = (weight.detach().double() + lora.scale * product.view(weight.shape)).to(weight)
    return weights


def is_adaptable(module: nn.Module | None) -> bool:
    """Whether low-rank matrices can adapt a layer."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
