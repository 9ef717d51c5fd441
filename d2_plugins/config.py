"""Config nodes of the plugins, and config files based on Detectron2's model zoo."""

from __future__ import annotations

import difflib
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from detectron2 import model_zoo
from detectron2.config import CfgNode as CN
from detectron2.config import LazyConfig
from detectron2.config.compat import guess_version
from detectron2.utils.file_io import PathManager
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from plugin_core.errors import ArgumentError, did_you_mean
from plugin_core.shipped import shipped_config

# Detectron2 reads these keys, although its own configs do not set them.
_OPTIONAL_LAZY_KEYS = (
    *("train.seed", "train.cudnn_benchmark", "train.float32_precision"),
    "train.max_non_finite_steps",  # of tools/lazyconfig_train_net.py
)


def add_plugin_config(cfg: CN) -> None:
    """Add the plugins' nodes to the ``cfg`` of ``get_cfg()``, before a file is merged in."""
    # ---------------------------------------------------------------------------- #
    # Block plugins: modules in a ResNet's blocks, after the last norm of the residual branch.
    # Read by the build_*resnet_plugin*_backbone builders, and for res5 by "Res5PluginROIHeads".
    # ---------------------------------------------------------------------------- #
    # A list in the order in which a block applies the plugins. Each entry is a mapping with
    # NAME: "triplet_attention", "ida" or another registered name; "timm:eca" or any other name
    #     that timm.layers.create_attn takes; "my_package.blocks:MyAttention", a class of your own
    # STAGES: the blocks of these stages get the plugin, for example ["res3", "res4", "res5"]
    # BLOCKS: "all" blocks of the stages, or the "last" one of each; "last" for IDA, otherwise "all"
    # WARM_START: whether the plugin starts as the identity; False. This keeps the features of a
    #     ResNet that was pretrained without it. Published checkpoints load the same either way.
    # and the arguments of the plugin's constructor, such as KERNEL_SIZE: 7
    cfg.MODEL.RESNETS.PLUGINS = []

    # ---------------------------------------------------------------------------- #
    # IDA as the classifier of regions. Read where MODEL.ROI_BOX_HEAD.NAME is "IDABoxHead" and
    # MODEL.ROI_HEADS.NAME is "StandardPluginROIHeads" or "CascadePluginROIHeads".
    # ---------------------------------------------------------------------------- #
    cfg.MODEL.ROI_BOX_HEAD.IDA = CN()
    # Number of heads; it divides the channels of the regions' features
    cfg.MODEL.ROI_BOX_HEAD.IDA.NUM_HEADS = 4
    # Added to the norm of a class's weights, > 0
    cfg.MODEL.ROI_BOX_HEAD.IDA.BETA = 1 / 32
    # Number of layers before the attention, which mix positions and channels: without them it does
    # not see where in a region something lies
    cfg.MODEL.ROI_BOX_HEAD.IDA.NUM_MIXERS = 2
    # Of version 0.2.0, whose runs have written it into their config.yaml
    cfg.register_deprecated_key("MODEL.ROI_BOX_HEAD.IDA.NUM_FC")
    # Whether to attend over the heads with two transformer layers and a projection
    cfg.MODEL.ROI_BOX_HEAD.IDA.HEAVY = False
    # What the second attention takes as a sample: "heads" as in the paper, or "interleaved" as in
    # the public reproduction
    cfg.MODEL.ROI_BOX_HEAD.IDA.SAMPLE_ORDER = "heads"
    # Whether the last head's norm divides the logits of all heads, as in the reproduction's first
    # version
    cfg.MODEL.ROI_BOX_HEAD.IDA.LAST_HEAD_NORM = False

    # ---------------------------------------------------------------------------- #
    # BatchFormer over the regions of a batch, in training only. Read where MODEL.ROI_HEADS.NAME is
    # "StandardPluginROIHeads", "CascadePluginROIHeads" or "Res5PluginROIHeads".
    # ---------------------------------------------------------------------------- #
    cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER = CN()
    # Whether regions also train through a BatchFormer, each with the same target
    cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER.ENABLED = False
    # Number of heads; it divides the width of the regions' features
    cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER.NUM_HEADS = 4
    # Rate in [0, 1)
    cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER.DROPOUT = 0.5
    # Number of layers, one after the other
    cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER.NUM_LAYERS = 1
    # Whether regions also attend to the other processes' regions in a distributed training
    cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER.GATHER = False

    # ---------------------------------------------------------------------------- #
    # Attention mask consistency: push the heat of a class's score, over a feature map, into the
    # class's boxes. Read where MODEL.META_ARCHITECTURE is "AMCGeneralizedRCNN" or "AMCRetinaNet".
    # ---------------------------------------------------------------------------- #
    cfg.MODEL.AMC = CN()
    # Name of a module that puts out the feature map, such as "backbone.bottom_up.res4"; empty for
    # the last stage of the backbone. The module must come before the scores.
    cfg.MODEL.AMC.ACTIVATION = ""
    # Names of the feature maps that count, for example ("p3", "p4"); empty for all. Only for a
    # module with several feature maps, such as "backbone" with an FPN
    cfg.MODEL.AMC.LEVELS = ()
    # Weight of the loss of means
    cfg.MODEL.AMC.MEAN_WEIGHT = 0.2
    # Weight of the loss of maxima
    cfg.MODEL.AMC.MAX_WEIGHT = 0.8
    # The mean heat inside shall exceed the mean outside by this margin in [0, 1]
    cfg.MODEL.AMC.MEAN_MARGIN = 0.1
    # The maximum inside shall exceed the maximum outside by this margin in [0, 1]
    cfg.MODEL.AMC.MAX_MARGIN = 0.5
    # Take the losses in every n-th step only
    cfg.MODEL.AMC.EVERY = 1
    # Number of an image's classes to take, at random; each costs a differentiation. 0 for all
    cfg.MODEL.AMC.CLASSES = 1
    # Region of a class: "all" for the union of its boxes, "random" for one of them in each step
    cfg.MODEL.AMC.BOXES = "all"
    # Resize heatmaps to the input before the losses: "image"; leave them as they are: "activation";
    # "auto" is "image" where a cell has at most 16 pixels on a side (res4, but not res5)
    cfg.MODEL.AMC.RESOLUTION = "auto"

    # ---------------------------------------------------------------------------- #
    # The optimizer of DETRs
    # ---------------------------------------------------------------------------- #
    # "SGD", or "ADAMW", which takes no SOLVER.MOMENTUM
    cfg.SOLVER.OPTIMIZER = "SGD"
    # With ADAMW: pairs such as ["backbone", 0.1], a part of parameters' names and a factor of their
    # learning rate. The first pair that fits counts.
    cfg.SOLVER.LR_FACTORS = []
    # With ADAMW, SOLVER.CLIP_GRADIENTS.CLIP_TYPE may also be "full_model": the norm of all
    # gradients together.

    # ---------------------------------------------------------------------------- #
    # Trainings that survive
    # ---------------------------------------------------------------------------- #
    # A step whose loss is not finite is left out. So many in a row end the training.
    cfg.SOLVER.MAX_NON_FINITE_STEPS = 20
    # Whether a training leaves out images that cannot be read. If not, the first one ends it.
    cfg.INPUT.SKIP_BAD_IMAGES = False

    # ---------------------------------------------------------------------------- #
    # A detector of MMDetection. Read where MODEL.META_ARCHITECTURE is "MMDetDetector".
    # ---------------------------------------------------------------------------- #
    cfg.MODEL.MMDET = CN()
    # Its config: the path of a file, or one of MMDetection's own, such as
    # "mmdet::detr/detr_r50_8xb2-150e_coco.py"
    cfg.MODEL.MMDET.CONFIG = ""
    # Changes to the config, such as ["model.bbox_head.num_classes=20"], each in the syntax of
    # MMDetection's --cfg-options. The command line replaces the whole list:
    # MODEL.MMDET.OVERRIDES "['model.bbox_head.num_classes=20']"
    cfg.MODEL.MMDET.OVERRIDES = []


@contextmanager
def naming(node: str) -> Iterator[None]:
    """Say in a constructor's error which setting below ``node`` is wrong.

    Raises:
        ValueError: with the setting's full path.
    """
    try:
        yield
    except ArgumentError as error:
        raise ValueError(f"{node}.{error.argument.upper()}: {error.reason}") from error


def merge_config(cfg: CN, config_file: str = "", options: Sequence[str] = ()) -> None:
    """Merge a config file and then command-line options into ``cfg``.

    The file may be based on a config of Detectron2's model zoo or of this project:
    ``_BASE_: "model_zoo://COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"``, ``_BASE_:
    "d2_plugins://COCO-Detection/faster_rcnn_R_50_triplet_FPN_1x.yaml"``. Otherwise this is
    ``cfg.merge_from_file`` and ``cfg.merge_from_list`` with errors that help.

    Args:
        cfg: with every node that the file and the options set.
        config_file: path of a yaml file; empty for none.
        options: keys and values in turn, such as ``["SOLVER.BASE_LR", "0.01"]``.

    Raises:
        ValueError: if the file or one of its bases is missing, a key does not exist, or a value is
            of the wrong type. For a key the message names the likely one.
    """
    if any(str(option).startswith("--") for option in options):
        raise ValueError(
            f"options that begin with -- come before keys and values, got {' '.join(options)}"
        )
    if len(options) % 2:
        raise ValueError(f"options come in pairs KEY VALUE, got an odd number: {' '.join(options)}")
    if config_file.endswith(".py"):
        raise ValueError(
            f"config file {config_file!r}: expected yaml; tools/lazyconfig_train_net.py takes a "
            "LazyConfig, tools/train_mmdet.py a config of MMDetection"
        )
    if config_file:
        source = f"config file {config_file!r}"
        try:
            loaded = _ModelZooBases.load_yaml_with_base(config_file, True)
            if not isinstance(loaded, dict):
                raise ValueError(f"{source}: not a yaml file of keys and values")
            version = loaded.get("VERSION") or guess_version(CN(loaded), config_file)
            if version == cfg.VERSION:
                _check_values(cfg, cfg, loaded, source)
                cfg.merge_from_other_cfg(CN(loaded))
            else:  # Detectron2 upgrades the file
                cfg.merge_from_file(config_file)
        except (OSError, YAMLError) as error:
            raise ValueError(f"{source}: {error}") from error
        except (KeyError, AssertionError, AttributeError, TypeError) as error:
            raise ValueError(f"{source}: not a yaml file of keys and values ({error})") from error
    for key, value in zip(options[::2], options[1::2], strict=True):
        *nodes, name = key.split(".")
        node: Any = cfg
        for part in nodes:
            node = node.get(part) if isinstance(node, CN) else None
        if not isinstance(node, CN):
            raise _no_key(cfg, key, "the command line")
        _check_values(cfg, node, {name: value}, "the command line", "".join(f"{n}." for n in nodes))
        cfg.merge_from_list([key, value])


def find_config_file(config_file: str) -> str:
    """Find a config file by its path, or by ``model_zoo://`` or ``d2_plugins://`` and a name.

    The first is Detectron2's model zoo, the second is ``configs/d2`` of this project.

    Raises:
        ValueError: if there is no such file.
    """
    try:
        return _path_of(config_file)
    except FileNotFoundError as error:
        raise ValueError(f"config file {config_file!r}: {error}") from error


def load_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Load a LazyConfig and apply command-line overrides.

    This is ``LazyConfig.load`` and ``LazyConfig.apply_overrides`` with errors that help.

    Args:
        config_file: path of a Python file, or as in `find_config_file`.
        overrides: each as "train.max_iter=100".

    Raises:
        ValueError: if the file is missing or does not load, or an override cannot be read or sets a
            key that nothing reads. For a key the message names the likely one.
    """
    path = find_config_file(config_file)
    if not path.endswith(".py"):
        raise ValueError(
            f"config file {config_file!r}: expected a LazyConfig, which is Python; "
            "tools/train_net.py takes yaml"
        )
    try:
        cfg = LazyConfig.load(path)
    except Exception as error:  # whatever the code in it raises
        raise ValueError(f"config file {config_file!r}: {error!r}") from error
    for override in overrides:
        if not override.startswith("+"):  # "+" adds a key
            _check_lazy_key(cfg, override.partition("=")[0])
        try:
            LazyConfig.apply_overrides(cfg, [override])
        except (HydraException, OmegaConfBaseException, KeyError, NotImplementedError) as error:
            raise ValueError(
                f"the command line: {override!r} is no override such as train.max_iter=100: {error}"
            ) from error
    return cfg


def _check_lazy_key(cfg: DictConfig, key: str) -> None:
    """Check that a key exists or belongs to a call. A call itself refuses wrong arguments."""
    node, parents = cfg, key.split(".")
    while parents and isinstance(node, DictConfig) and "_target_" not in node:
        name = parents.pop(0)
        if name not in node and key not in _OPTIONAL_LAZY_KEYS:
            hint = did_you_mean(name, map(str, node))
            raise ValueError(f"the command line: there is no config key {key}{hint}")
        node = node.get(name)


_KINDS = {
    **{"list": "a list", "tuple": "a list", "str": "a text", "bool": "True or False"},
    **{"int": "a whole number", "float": "a number with a decimal point"},
}
# Of earlier configs, in which each block plugin had a node of its own
_EARLIER_KEYS = tuple(f"MODEL.RESNETS.{n}" for n in ("TRIPLET_ATTENTION", "IDA", "PLUGIN_ORDER"))


class _ModelZooBases(CN):
    """Loads yaml files whose bases may be Detectron2's or this project's own."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        # A base arrives joined to the folder of the file that names it. A base with a prefix
        # ignores the folder. A base of such a base is joined to a folder of its own.
        return super()._open_cfg(_path_of(filename))


def _path_of(filename: str) -> str:
    """Find a config by a path that may hold a prefix; raises FileNotFoundError."""
    # Of a base, the folder of the file that names it comes before.
    filename = filename[max(0, *(filename.rfind(p) for p in ("model_zoo://", "d2_plugins://"))) :]
    if filename.startswith("model_zoo://"):
        name = posixpath.normpath(filename.removeprefix("model_zoo://"))
        try:
            return model_zoo.get_config_file(name)
        except RuntimeError as error:
            raise FileNotFoundError(f"Detectron2's model zoo has no config {name!r}") from error
    filename = shipped_config(filename)
    if not PathManager.isfile(filename):
        raise FileNotFoundError(f"there is no file {filename!r}")
    return filename


def _check_values(
    cfg: CN, node: CN, values: Mapping[str, Any], source: str, path: str = ""
) -> None:
    """Check keys and types before yacs does, which tells less.

    Args:
        cfg: the whole config.
        node: the part of it that the values are for.
        values: by their keys, as a file or the command line has them.
        source: of the values, for messages.
        path: of the node, with a dot behind it.

    Raises:
        ValueError: names the key, and the likely one or the type.
    """
    for name, value in values.items():
        key = f"{path}{name}"
        if name not in node:
            if node.is_new_allowed() or cfg.key_is_deprecated(key) or cfg.key_is_renamed(key):
                continue
            raise _no_key(cfg, key, source)
        known = node[name]
        if isinstance(known, CN) and isinstance(value, Mapping):
            _check_values(cfg, known, value, source, f"{key}.")
            continue
        new = CN._decode_cfg_value(value)  # "1" is a number there
        types = {type(known), type(new)}
        # yacs takes None for anything; numbers and lists have no use for it.
        lacks = new is None and isinstance(known, (int, float, list, tuple))
        if lacks or not (len(types) == 1 or type(None) in types or types == {list, tuple}):
            kind = "a node of keys and values" if isinstance(known, CN) else type(known).__name__
            got = dict(new) if isinstance(new, CN) else new
            raise ValueError(f"{source}: {key}: must be {_KINDS.get(kind, kind)}, got {got!r}")


def _no_key(cfg: CN, key: str, source: str) -> ValueError:
    """Make the error of a key that does not exist, and name the one that was probably meant."""
    if key.startswith(_EARLIER_KEYS):
        return ValueError(
            f"{source}: there is no config key {key}; block plugins are one list, "
            "MODEL.RESNETS.PLUGINS, such as [{'NAME': 'triplet_attention', 'STAGES': ['res5']}]"
        )
    known = list(_keys(cfg))
    likely = [k for k in known if k.endswith("." + key)] or difflib.get_close_matches(key, known)
    hint = f"; did you mean {' or '.join(likely)}?" if likely else ""
    return ValueError(f"{source}: there is no config key {key}{hint}")


def _keys(node: CN, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CN):
            yield from _keys(value, f"{prefix}{key}.")
