"""What `state_study.py` measures, as lines of data: the options of `state_precision`, by group.

A line is what a recipe says under `state_precision`; its name is made from it. Add lines to measure more.
"""

from collections.abc import Iterator

Options = dict[str, object]

SHORT = {"ssm_state": "ssm", "conv_state": "conv", "kv_cache": "kv"}
SAID = {"format": "{}", "rounding": "{}", "residual": "residual {}", "scale": "{}", "axis": "along {}", "block": "blocks of {}",
        "every": "every {}"}  # fmt: skip

NEAREST, STOCHASTIC = {"rounding": "nearest"}, {"rounding": "stochastic"}
BLOCKS = ({}, {"block": 8}, {"block": 4})
WHOLE = ("int8", "int4")


def ssm(format: str, **said: object) -> Options:
    return {"ssm_state": {"format": format, **said}}


def conv(format: str, **said: object) -> Options:
    return {"conv_state": {"format": format, **said}}


def kv(format: str, **said: object) -> Options:
    return {"kv_cache": {"format": format, **said}}


RECURRENT = [
    *(ssm(f) for f in ("fp16", "bf16")),
    *(ssm(f, **r) for f in WHOLE for r in (NEAREST, STOCHASTIC)),
    ssm("fp8-e4m3"),
    *(ssm(f, **r, **b) for f in WHOLE for b in BLOCKS[1:] for r in (NEAREST, STOCHASTIC)),
    *(ssm("fp8-e4m3", **b) for b in BLOCKS[1:]),
    *(ssm(f, scale="static", **r) for f in WHOLE for r in (NEAREST, STOCHASTIC)),
    ssm("fp8-e4m3", scale="static"),
]
OTHERS = [
    kv("bf16"), conv("bf16"), conv("fp16"), conv("int8", scale="static"), conv("fp8-e4m3", scale="static"),
    *(kv(f, **b) for f in WHOLE for b in ({}, {"block": 16}, {"block": 8})),
    *(kv(f, **STOCHASTIC) for f in WHOLE),
    *(kv(f, scale="static") for f in WHOLE),
    kv("fp8-e4m3"), kv("int4", block=4),
]  # fmt: skip
SIX = [ssm("bf16"), ssm("fp8-e4m3"), *(ssm(f, **r) for f in WHOLE for r in (NEAREST, STOCHASTIC))]
AXIS = [ssm(f, axis="d_inner", block=32, **STOCHASTIC) for f in WHOLE] + [
    ssm("int8", axis="d_inner", **r) for r in (NEAREST, STOCHASTIC)
]
DITHERED = [ssm(f, **STOCHASTIC) for f in ("bf16", "fp16", "fp8-e4m3")]
FEEDBACK = [
    ssm(f, rounding="error_feedback", residual=r)
    for f, r in (("int4", "int4"), ("int8", "int4"), ("int4", "int8"), ("fp8-e4m3", "int4"), ("int8", "int8"))
]
CADENCE = [
    ssm(f, every=n, **r) for n in (4, 16, 64) for f, r in (("int8", NEAREST), ("int4", STOCHASTIC), ("int4", NEAREST))
]
REMEMBERED = [
    ssm("int8", **STOCHASTIC),
    ssm("int4", **STOCHASTIC),
    ssm("int4"),
    kv("int8"),
    kv("int4"),
    ssm("fp8-e4m3"),
]
JOINT = [
    {**state, **conv("bf16"), **cache}
    for state in (ssm("int8", **STOCHASTIC), ssm("int4", **STOCHASTIC))
    for cache in (kv("bf16"), kv("int8"), kv("int4", block=8), kv("int4"))
]

EACH_FORM = [
    ssm("int8"), ssm("int4", **STOCHASTIC), ssm("int8", rounding="error_feedback", residual="int4"), ssm("int8", every=16),
    conv("bf16"), kv("int4"), {**ssm("int4", axis="d_inner", block=32, every=4, **STOCHASTIC), **kv("int8", block=16, **STOCHASTIC)},
]  # fmt: skip

GROUPS = {
    "recurrent": RECURRENT, "others": OTHERS, "length": SIX, "joint": JOINT, "recall": REMEMBERED, "prefill": SIX,
    "axis": AXIS, "dithered": DITHERED, "feedback": FEEDBACK, "cadence": CADENCE,
}  # fmt: skip


def one_layer(states: list[int], caches: list[int]) -> list[Options]:
    """The recurrent state, or the KV cache, of a single layer; these layers have one."""
    said = [("ssm_state", i, {"format": f, **r}) for i in states for f in WHOLE for r in (NEAREST, STOCHASTIC)]
    said += [("kv_cache", i, {"format": f}) for i in caches for f in WHOLE]
    return [{"overrides": [{"kind": kind, "layers": [layer], **each}]} for kind, layer, each in said]


def last_cache_narrow(states: list[int], caches: list[int]) -> list[Options]:
    """The last KV cache at 4 bits, the others at 8."""
    narrow = [{"kind": "kv_cache", "layers": [caches[-1]], "format": "int4"}]
    kept = (ssm("int8", **STOCHASTIC), ssm("int4", **STOCHASTIC))
    return [{**state, **conv("bf16"), **kv("int8"), "overrides": narrow} for state in kept]


BY_LAYER = {
    "layers": one_layer,
    "mixed": last_cache_narrow,
}  # groups whose lines follow from which layers remember what


def name(options: Options) -> str:
    """Such as `ssm int8 stochastic, kv int4 nearest blocks of 8`."""
    return ", ".join(_names(options))


def _names(options: Options) -> Iterator[str]:
    for kind, said in options.items():
        for each in said if kind == "overrides" else [said]:
            layers = f" of layer {each['layers'][0]}" if "layers" in each else ""
            words = (SAID[key].format(each[key]) for key in SAID if key in each)
            yield f"{SHORT[each.get('kind', kind)]}{layers} {' '.join(words)}"


def is_random(options: Options) -> bool:
    """Whether it is measured with every seed."""
    return "stochastic" in name(options)
