"""Opens a checkpoint folder as a `HybridModel`: everything that can be refused is refused before a weight is read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch

from compress.checkpoint import companions, compressed_tensors, stored
from compress.checkpoint.compressed_tensors import Scheme
from compress.checkpoint.folder import INDEX, SINGLE, WeightFolder
from compress.checkpoint.safetensors_file import DTYPE_NAMES
from compress.disk.json_files import read_json
from compress.errors import InputError
from compress.model import families
from compress.model.architecture import Architecture
from compress.model.hybrid import HybridModel
from compress.model.roles import Role
from compress.model.weight import PLAIN_FORMATS, Spec, Unit, UnitSpec, Weight, is_finite
from compress.output_folder import onnx_layouts
from compress.output_folder.integrity import is_output
from compress.strict.json_text import JsonObject
from compress.terminal import progress

CHECKPOINT = "checkpoint"  # in an output folder of `apply`
CONFIG_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def open_config(folder: Path) -> tuple[Architecture, JsonObject]:
    """The family, bound to its validated configuration, and config.json itself."""
    path = folder / "config.json"
    values = read_json(path)
    return parse_config(values, str(path)), values


def parse_config(values: JsonObject, source: str) -> Architecture:
    """The same of a config.json that was read already; `source` says where it stood."""
    supported = families.names()
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in supported:
        raise InputError(f"{source}: model_type '{model_type}' is not supported; supported: {', '.join(supported)}")
    return families.get(model_type).parse(values, source)


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or that of an output folder of `apply`."""
    if path.suffix == ".onnx" or (onnx_layouts.find(path) and not has_weights(path)):
        raise InputError(f"{path}: an ONNX model; expected a checkpoint folder, or an output folder of apply")
    if not path.is_dir():
        raise InputError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    if is_output(path) and (path / CHECKPOINT).is_dir():
        return path / CHECKPOINT
    if (path / "config.json").is_file():
        return path
    raise InputError(f"{path}: neither a checkpoint folder (no config.json) nor a finished output of apply")


def config_dtype(values: JsonObject, source: str) -> torch.dtype:
    """The type config.json says the weights have; bfloat16 where it names none."""
    name = next((values[key] for key in ("dtype", "torch_dtype") if values.get(key) is not None), "bfloat16")
    if not isinstance(name, str) or name not in CONFIG_DTYPES:
        raise InputError(f"{source}: dtype '{name}' is not known; expected one of {', '.join(CONFIG_DTYPES)}")
    return CONFIG_DTYPES[name]


def model_of_config(folder: Path, formats: Mapping[str, str] | None = None) -> HybridModel:
    """The model a folder with only config.json describes: shapes, roles and formats, and no weights to load. `formats` has
    those of tensors, by name, where they are known; else they are of the type config.json names."""
    architecture, values = open_config(folder)
    number_format = PLAIN_FORMATS[config_dtype(values, str(folder / "config.json"))]

    def load(rows: slice | None = None) -> NoReturn:
        raise InputError(f"{folder}: has no weight files")

    def weight(spec: Spec) -> Weight:
        return Weight(spec.name, spec.role, spec.shape, (formats or {}).get(spec.name, number_format), load)

    units = tuple(Unit(unit.name, {s.name: weight(s) for s in unit.specs}) for unit in architecture.layout())
    return HybridModel(architecture, units, values)


class Checkpoint:
    """An opened folder: `model` (lazily read units), `config` (config.json as it is) and the weight files."""

    def __init__(self, folder: Path, *, allow_quantized: bool = False):
        self.folder = folder
        architecture, self.config = open_config(folder)
        self.is_quantized = self.config.get("quantization_config") is not None
        if self.is_quantized and not allow_quantized:
            raise InputError(
                f"{folder / 'config.json'}: the model is already quantized (quantization_config); start from the original"
            )
        self.files = WeightFolder(folder, architecture.names_of_stored)
        companions.refuse_pointers(folder)
        self._schemes = (
            compressed_tensors.schemes_of(self.config, folder, self.files.names) if self.is_quantized else {}
        )
        self._check_layer_count(architecture)
        *before, head = (self._unit(spec) for spec in architecture.layout())
        units = (*before, self._with_travellers(head, architecture))
        self._refuse_extra(units, architecture)
        self.model = HybridModel(architecture, units, self.config)

    def weights_sha256(self) -> str:
        """Digest of the weight files, with a bar: it reads them all."""
        with progress.task("hashing the weights", self.files.bytes) as advance:
            return self.files.sha256(advance)

    def sha256(self, weights_sha256: str) -> str:
        """Digest of everything that decides the logits: the weights (their digest is given) and config.json."""
        return hashlib.sha256(f"{weights_sha256}/{json.dumps(self.config, sort_keys=True)}".encode()).hexdigest()

    def _check_layer_count(self, architecture: Architecture) -> None:
        """A config that promises more layers than there are tensors is refused before they are enumerated."""
        parsed = architecture.config
        if parsed.num_hidden_layers > len(self.files.names):
            raise InputError(
                f"{self.folder / 'config.json'}: num_hidden_layers is {parsed.num_hidden_layers}, "
                f"but the weight files hold {len(self.files.names)} tensors in all"
            )

    def _unit(self, spec: UnitSpec) -> Unit:
        return Unit(spec.name, {tensor.name: self._weight(tensor) for tensor in spec.specs})

    def _with_travellers(self, head: Unit, architecture: Architecture) -> Unit:
        """The last unit with the tensors that the model's family has beside its layers, in the shapes they have."""
        names = sorted(name for name in self.files.names if name.startswith(architecture.TRAVELLING))
        specs = (Spec(name, self.files.entry(name).shape, Role.MTP) for name in names)
        return Unit(head.name, head.weights | {spec.name: self._weight(spec) for spec in specs})

    def _weight(self, spec: Spec) -> Weight:
        if spec.name in self._schemes:
            if len(spec.shape) != 2:
                raise InputError(f"{self.folder}: tensor '{spec.name}' is stored quantized, but is not a matrix")
            return self._quantized_weight(spec, self._schemes[spec.name])
        self._expect(spec.name, spec.shape, None, spec)
        dtype = self.files.entry(spec.name).dtype
        if dtype not in PLAIN_FORMATS:
            raise InputError(
                f"{self.files.path_of(spec.name)}: tensor '{spec.name}' is {DTYPE_NAMES[dtype]}; expected BF16, F16 or F32"
            )
        return stored.plain_weight(spec, PLAIN_FORMATS[dtype], self._finite)

    def _quantized_weight(self, spec: Spec, scheme: Scheme) -> Weight:
        if scheme.rotation and spec.shape[1] % scheme.rotation:
            raise InputError(
                f"{self.folder / 'config.json'}: transform_config rotates '{spec.name}' in blocks of {scheme.rotation}, "
                f"which do not divide its {spec.shape[1]} inputs"
            )
        weight = stored.quantized_weight(spec, scheme, self._finite)
        for name, part in weight.layout().items():
            self._expect(name, part.shape, part.dtype, spec)
        return weight

    def _expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, spec: Spec) -> None:
        if name not in self.files.names:
            raise InputError(
                f"{self.folder}: tensor '{name}' is missing ({self.folder / 'config.json'} implies it, shape {list(spec.shape)})"
            )
        entry = self.files.entry(name)
        if entry.shape != shape:
            raise InputError(
                f"{self.files.path_of(name)}: tensor '{entry.name}' has shape {list(entry.shape)}, config.json implies {list(shape)}"
            )
        if dtype is not None and entry.dtype != dtype:
            raise InputError(
                f"{self.files.path_of(name)}: tensor '{entry.name}' is {DTYPE_NAMES[entry.dtype]}, expected {DTYPE_NAMES[dtype]}"
            )

    def _finite(self, name: str, rows: slice | None) -> torch.Tensor:
        tensor = self.files.read(name, rows)
        if not is_finite(tensor):
            raise InputError(f"{self.files.path_of(name)}: tensor '{name}' holds NaN or infinite values")
        return tensor

    def _refuse_extra(self, units: tuple[Unit, ...], architecture: Architecture) -> None:
        known = {name for unit in units for weight in unit.weights.values() for name in weight.layout()}
        extra = sorted(self.files.names - known)
        if architecture.config.tie_word_embeddings and extra == [architecture.LM_HEAD]:
            self._refuse_untied_head(units[0].weights[architecture.EMBEDDING], architecture.LM_HEAD)
        elif extra:
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise InputError(
                f"{self.files.path_of(extra[0])}: unexpected tensor '{extra[0]}'{more}; config.json does not imply it"
            )

    def _refuse_untied_head(self, embedding: Weight, head: str) -> None:
        """A head beside tied embeddings may only repeat them: else one of the two would be dropped silently."""
        entry = self.files.entry(head)
        same_shape = entry.shape == embedding.shape
        if not same_shape or any(
            not torch.equal(self.files.read(head, rows).float(), embedding.dense(rows))
            for rows in embedding.row_blocks()
        ):
            raise InputError(
                f"{self.files.path_of(head)}: '{head}' differs from the embedding although config.json ties them (tie_word_embeddings)"
            )
