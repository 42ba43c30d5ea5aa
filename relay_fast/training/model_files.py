"""Model files: a checkpoint with the model's config, and the six models of a run folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from relay_fast import __version__
from relay_fast.config import ModelConfig
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import Task, Vocabulary, tasks_of_config
from relay_fast.training.checkpoint import pack_training_state, unpack_training_state
from relay_fast.utils.numbers import plain_numbers
from relay_fast.utils.tensor_files import CheckpointError, load_checkpoint, save_checkpoint

Model = LoopedTransformer | AutoregressiveTransformer

# The models that a run saves in its folder.
RUN_MODELS = (
    "looped_aligned",
    "ar_relay",
    "ar_baseline",
    "looped_vanilla",
    "ar_self_truth",
    "ar_self_loop",
)


def save_model(
    path: str | os.PathLike,
    model: Model,
    info: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the model and its config to `path`.

    Args:
        path: the safetensors file.
        model: the model to save.
        info: JSON-able facts about the model, such as seed and stage.
        dtype: of the weights in the file, default their own; loading restores their dtype.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    looped = isinstance(model, LoopedTransformer)
    metadata = {
        "config": model.config.to_dict(),
        "kind": "looped" if looped else "autoregressive",
        "supervise": model.supervise if looped else None,
        "info": plain_numbers(info),
    }
    tensors = pack_training_state(model)
    if dtype is not None:
        tensors = {name: value.to(dtype) for name, value in tensors.items()}
    save_checkpoint(path, tensors, metadata)


def load_model(
    path: str | os.PathLike, device: torch.device | str = "cpu", impl: str = "auto"
) -> tuple[Model, dict[str, Any]]:
    """Loads a model that `save_model` wrote.

    Args:
        path: the file.
        device: where to put the model.
        impl: "auto", "triton" or "torch".

    Returns:
        The model in eval mode, and its `info`.

    Raises:
        CheckpointError: if the file is missing, damaged or holds no model.
        ValueError: if the device does not exist.
    """
    check_device(device)
    tensors, metadata = load_checkpoint(path)
    kind = metadata.get("kind")
    if kind not in ("looped", "autoregressive"):
        raise CheckpointError(
            f"{path} holds no model (its header names no kind); give a file written by "
            f"relay_fast.training.model_files.save_model."
        )
    try:
        config = ModelConfig.from_dict(metadata["config"])
        if kind == "looped":
            model: Model = LoopedTransformer(config, supervise=metadata["supervise"], impl=impl)
        else:
            model = AutoregressiveTransformer(config, impl=impl)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} holds a model of another version of relay_fast that version {__version__} "
            f"cannot build ({why}); use that version, or train the model again."
        ) from error
    unpack_training_state(tensors, model, source=path)
    return model.to(device).eval(), metadata.get("info", {})


def model_hash(model: Model) -> str:
    """Computes 16 hexadecimal digits from the model's kind, config and weights."""
    digest = hashlib.sha256(json.dumps([type(model).__name__, model.config.to_dict()]).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def model_path(run: str | os.PathLike, name: str) -> Path:
    """Returns the path of the model called `name` in a run folder."""
    return Path(run) / f"{name}.safetensors"


def load_run_model(
    run: str | os.PathLike, name: str, device: torch.device | str = "cpu", impl: str = "auto"
) -> Model:
    """Loads a model of a run folder.

    Args:
        run: the run folder.
        name: one of RUN_MODELS.
        device: where to put the model.
        impl: "auto", "triton" or "torch".

    Raises:
        ValueError: for an unknown name or device.
        CheckpointError: as `load_model`.
    """
    if name not in RUN_MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(RUN_MODELS)}.")
    return load_model(model_path(run, name), device, impl)[0]


def run_tasks(config: Mapping[str, Any]) -> tuple[Vocabulary, dict[str, Task]]:
    """Builds the vocabulary and the tasks, by name, of a run's config.

    config["vocabulary"] holds the parameters of Vocabulary, config["tasks"][name] the class and the
    parameters of a task. Raises ValueError as their constructors do.
    """
    vocabulary = Vocabulary.from_dict(config["vocabulary"])
    return vocabulary, tasks_of_config(config["tasks"], vocabulary)


def check_device(device: torch.device | str) -> None:
    """Raises ValueError unless `device` is the CPU or a CUDA device of this machine."""
    name = str(device)
    try:
        device = torch.device(device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is unknown: use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but CUDA is not available: use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(
            f"device {name!r} does not exist, there are {count} CUDA devices: use cuda:0"
        )
