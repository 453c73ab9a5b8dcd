"""Hugging Face directories damaged in about 150 ways, from one seed.

A case is what is done to a good directory, and what a refusal must say. Damage that no one can see
(a weight that stays a number) may be imported: exactly as the files have it.
"""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

WEIGHTS, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
NORM, UP, DOWN = (
    "model.norm.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
)
Header = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What happens to a directory, and parts of what a refusal says."""

    name: str
    kind: str  # single, sharded or bin: how its weights lie
    damage: Callable[[Path], Any]
    said: tuple[str, ...] = ()
    harmless: bool = False  # whether it may be imported instead


def cases() -> Iterator[Case]:
    """All of them; each time the same."""
    for generate in (files, bytes_of_files, headers, values, configs, indices, pickles):
        yield from generate(random.Random(generate.__name__))


# Files that are not what they should be


def files(_: random.Random) -> Iterator[Case]:
    for kind, name in (
        *(("single", file) for file in ("config.json", WEIGHTS)),
        *(("sharded", file) for file in (INDEX, "model-00001-of-00002.safetensors")),
        ("bin", BIN),
    ):
        for how in INSTEAD:
            said = (name,) if kind == "sharded" or name == "config.json" else ()
            yield Case(f"{name}: {how}", kind, partial(_instead, name, how), said)


def _instead(name: str, how: str, directory: Path) -> None:
    replace(directory / name, how)


def replace(file: Path, how: str) -> None:
    """Something else in the place of a file; see INSTEAD."""
    file.unlink()
    INSTEAD[how](file)


INSTEAD: dict[str, Callable[[Path], Any]] = {
    "gone": lambda file: None,
    "empty": Path.touch,
    "a directory": Path.mkdir,
    "a dangling link": lambda file: file.symlink_to("nowhere"),
    "not text": lambda file: file.write_bytes(b"\xff\xfe\x00{}"),
    "deep": lambda file: file.write_text("[" * 200_000),
    "half": lambda file: file.write_text('{"model_type": "llama", "hid'),
    "a list": lambda file: file.write_text("[1, 2]"),
}


# Bytes that are cut, added or flipped


def bytes_of_files(rng: random.Random) -> Iterator[Case]:
    for kind, name in (
        ("single", WEIGHTS),
        ("bin", BIN),
        ("sharded", INDEX),
        ("single", "config.json"),
    ):
        for share in (0.001, rng.random(), rng.random(), 0.999):
            if share < 0.9 or name != "config.json":  # whose last byte ends a line
                yield Case(f"{name} cut at {share:.3f}", kind, partial(_cut, name, share), ())
        yield Case(f"{name} with more behind it", kind, partial(_append, name), harmless=True)
    for name, kind, first, count in (
        (WEIGHTS, "single", True, 6),
        (WEIGHTS, "single", False, 6),
        (BIN, "bin", True, 4),
        (BIN, "bin", False, 3),
    ):
        for number in range(count):
            place = rng.random()
            damage = partial(_flip, name, place, first, rng.randrange(8))
            where = "head" if first else "body"
            yield Case(f"{name} bit {number} of its {where}", kind, damage, harmless=True)


def _cut(name: str, share: float, directory: Path) -> None:
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: int(share * len(content))])


def _append(name: str, directory: Path) -> None:
    with (directory / name).open("ab") as stream:
        stream.write(b"\0" * 64)


def _flip(name: str, place: float, head: bool, bit: int, directory: Path) -> None:
    content = bytearray((directory / name).read_bytes())
    middle = min(2000, len(content) // 2)
    low, high = (0, middle) if head else (middle, len(content))
    content[low + int(place * (high - low))] ^= 1 << bit
    (directory / name).write_bytes(content)


# Headers of safetensors


def headers(_: random.Random) -> Iterator[Case]:
    for length in (0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1):
        yield Case(f"header of {length} bytes", "single", partial(_length, length), (WEIGHTS,))
    for name, change, said in (
        ("overlapping", partial(_entry, UP, data_offsets=[0, 1536]), ()),
        ("beyond the end", partial(_entry, UP, data_offsets=[10**6, 10**6 + 1536]), ()),
        ("backwards", partial(_entry, UP, data_offsets=[1536, 0]), ()),
        ("negative", partial(_entry, UP, data_offsets=[-1536, 0]), ()),
        ("offsets that are text", partial(_entry, UP, data_offsets="all"), ()),
        ("a hole", lambda header: header.pop(UP), ()),
        ("unknown type", partial(_entry, UP, dtype="F12"), ()),
        ("type of other size", partial(_entry, UP, dtype="F16"), ()),
        ("type of the same size", partial(_entry, UP, dtype="I32"), (UP, "I32")),
        ("shape of as many", partial(_entry, UP, shape=[16, 24]), (UP, "[16, 24]")),
        ("shape of more", partial(_entry, UP, shape=[240, 16]), ()),
        ("negative shape", partial(_entry, UP, shape=[-24, -16]), ()),
        ("huge shape", partial(_entry, UP, shape=[2**40, 2**40]), ()),
        ("one dimension", partial(_entry, UP, shape=[384]), (UP, "[384]")),
        ("seventy dimensions", partial(_entry, UP, shape=[24, 16] + [1] * 70), (UP,)),
        ("no shape", lambda header: header[UP].pop("shape"), ()),
        ("an entry that is a number", lambda header: header.update({UP: 3}), ()),
        ("metadata that is no text", lambda header: header["__metadata__"].update(a=[1]), ()),
        ("renamed", partial(_rename, UP, "model.layers.0.mlp.up.weight"), (UP, "mlp.up.weight")),
        ("named as a path", partial(_rename, UP, "../../../tmp/up"), (UP, "../../../tmp/up")),
        ("named by nothing", partial(_rename, UP, ""), (UP,)),
        ("another layer", partial(_rename, UP, UP.replace(".0.", ".00.")), (UP,)),
        ("layer 7", partial(_rename, UP, UP.replace(".0.", ".7.")), (UP, ".7.")),
        ("a long name", partial(_rename, UP, "x" * 10**6), (UP,)),
        ("a name that clears the screen", partial(_rename, UP, "\x1b[2J\n\rok"), (UP, "x1b[2J")),
        ("changed over", partial(_swap, UP, UP.replace("up", "gate")), None),
        ("listed in another order", _reverse, None),
    ):
        damage = partial(_rewrite, change)
        yield Case(f"header: {name}", "single", damage, said or (), harmless=said is None)
    yield Case("header: a name twice", "single", _twice, harmless=True)
    yield Case("data in another order", "single", _reorder, harmless=True)


def read_header(file: Path) -> tuple[Header, bytes]:
    """What a safetensors file says, and the bytes behind it."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write(file: Path, text: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _rewrite(change: Callable[[Header], Any], directory: Path) -> None:
    header, data = read_header(directory / WEIGHTS)
    change(header)
    _write(directory / WEIGHTS, json.dumps(header).encode(), data)


def _length(length: int, directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])


def _entry(name: str, header: Header, **changes: Any) -> None:
    header[name] |= changes


def _rename(name: str, other: str, header: Header) -> None:
    header[other] = header.pop(name)


def _swap(name: str, other: str, header: Header) -> None:
    header[name], header[other] = header[other], header[name]


def _reverse(header: Header) -> None:
    for name in reversed(list(header)):
        header[name] = header.pop(name)


def _twice(directory: Path) -> None:
    header, data = read_header(directory / WEIGHTS)
    other = json.dumps({UP: header[UP.replace("up", "gate")]})
    text = json.dumps(header)[:-1] + ", " + other[1:]
    _write(directory / WEIGHTS, text.encode(), data)


def _reorder(directory: Path) -> None:
    """The same tensors, the last one first: an ordinary file, if unusual."""
    header, data = read_header(directory / WEIGHTS)
    moved, place = b"", 0
    for name in reversed([name for name in header if name != "__metadata__"]):
        start, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [place, place + end - start]
        moved += data[start:end]
        place += end - start
    _write(directory / WEIGHTS, json.dumps(header).encode(), moved)


# Values that are no numbers


def values(rng: random.Random) -> Iterator[Case]:
    patterns = {
        "F32": {"nan": 0x7FC00000, "inf": 0x7F800000},
        "F16": {"inf": 0x7C00},
        "BF16": {"nan": 0x7FC0},
    }
    for dtype, bits in patterns.items():
        for name, pattern in bits.items():
            damage = partial(_put, dtype, pattern, DOWN, rng.random())
            yield Case(f"{name} in {dtype}", "single", damage, (DOWN, "not finite"))


def _put(dtype: str, pattern: int, name: str, place: float, directory: Path) -> None:
    """A bit pattern, in the middle of the file as it is converted to a type."""
    from safetensors.torch import save_file

    torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    tensors = {n: tensor.to(torch_dtype) for n, tensor in load_file(directory / WEIGHTS).items()}
    save_file(tensors, directory / WEIGHTS)
    header, data = read_header(directory / WEIGHTS)
    start, end = header[name]["data_offsets"]
    size = 4 if dtype == "F32" else 2
    at = start + size * int(place * (end - start) / size)
    content = pattern.to_bytes(size, "little")
    text = json.dumps(header).encode()
    _write(directory / WEIGHTS, text, data[:at] + content + data[at + size :])


# A config.json that lies


WRONG: tuple[Any, ...] = (
    *(None, "4", "four", [4], {"a": 4}, True, 3.5, 0, -4, 7, 2**20, 2**62),
    *(float("nan"), float("inf"), 1e308),
)
SIZE_KEYS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size", "head_dim", "max_position_embeddings"),
)
OTHER_KEYS = (
    *("rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "hidden_act", "architectures", "model_type"),
    *("sliding_window", "layer_types", "quantization_config", "auto_map", "a_new_key"),
)


def configs(rng: random.Random) -> Iterator[Case]:
    for key in SIZE_KEYS:
        for value in rng.sample(WRONG[:12], 4):
            yield _config(key, value)
    for key in OTHER_KEYS:
        for value in rng.sample(WRONG, 2):
            yield _config(key, value)
    for changes, said in (
        ({"model_type": "mistral"}, ("architectures", "mistral")),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, ("q_proj.bias",)),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, ("q_norm",)),
        ({"attention_bias": True}, ("self_attn.o_proj.bias is missing",)),
        ({"mlp_bias": True}, ("mlp.down_proj.bias is missing",)),
        ({"tie_word_embeddings": True}, ("lm_head.weight differs",)),
        ({"num_hidden_layers": 2**20}, ("num_hidden_layers = 1048576",)),
        ({"num_attention_heads": 2**20, "num_key_value_heads": 2**20}, ("q_proj",)),
    ):
        yield Case(f"config: {changes}", "single", partial(_configure, changes), said)


def _config(key: str, value: Any) -> Case:
    plausible = value is None or isinstance(value, int)  # then tensors tell, by their shapes
    said = () if plausible else (key,)
    damage = partial(_configure, {key: value})
    return Case(f"{key} = {value!r:.30}", "single", damage, said, harmless=True)


def _configure(changes: dict[str, Any], directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# An index that leads elsewhere


def indices(_: random.Random) -> Iterator[Case]:
    for place in (
        *("../outside.safetensors", "/etc/passwd", "/etc/passwd.safetensors", "", ".", ".."),
        *("sub/x.safetensors", "./x.safetensors", "~/x.safetensors", "C:\\x.safetensors", 3, None),
        *(["x.safetensors"], {"a": 1}, "x\0.safetensors", "\ud800.safetensors", "config.json"),
        *("x" * 5000 + ".safetensors", "pytorch_model.bin", "x.safetensors\n", ".safetensors"),
        *("no-such.safetensors", "//x.safetensors", "model-00001-of-00002.safetensors/"),
    ):
        damage = partial(_index, lambda index, place=place: index["weight_map"].update({UP: place}))
        yield Case(f"index: {place!r:.40}", "sharded", damage, (UP,))
    for name, change, said in (
        (
            "a tensor that is not there",
            lambda i: i["weight_map"].update(ghost=_first(i)),
            ("ghost",),
        ),
        ("a tensor left out", lambda i: i["weight_map"].pop(UP), (UP,)),
        ("all in the first file", lambda i: i.update(weight_map=_all_first(i)), ("is not in",)),
        ("no map", lambda i: i.pop("weight_map"), (INDEX, "weight_map")),
        ("an empty map", lambda i: i.update(weight_map={}), (INDEX, "weight_map")),
        ("a list for a map", lambda i: i.update(weight_map=[UP]), (INDEX, "weight_map")),
        ("a total that is wrong", lambda i: i["metadata"].update(total_size=1), None),
        ("no metadata", lambda i: i.pop("metadata"), None),
    ):
        damage = partial(_index, change)
        yield Case(f"index: {name}", "sharded", damage, said or (), harmless=said is None)
    for name, shard in (("first", 1), ("second", 2)):
        file = f"model-{shard:05d}-of-00002.safetensors"
        yield Case(f"{name} shard is lost", "sharded", lambda d, f=file: (d / f).unlink(), (file,))
    yield Case("shards changed over", "sharded", _change_over, ("the index does not say so",))


def _index(change: Callable[[dict[str, Any]], Any], directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def _first(index: dict[str, Any]) -> str:
    return str(min(index["weight_map"].values()))


def _all_first(index: dict[str, Any]) -> dict[str, str]:
    return dict.fromkeys(index["weight_map"], _first(index))


def _change_over(directory: Path) -> None:
    first, second = (directory / f"model-{n:05d}-of-00002.safetensors" for n in (1, 2))
    first.rename(directory / "third")
    second.rename(first)
    (directory / "third").rename(second)


# Pickles that hold something else than tensors


class Unknown:
    """A class that no model holds; weights-only loading refuses whatever it does not know."""


def pickles(_: random.Random) -> Iterator[Case]:
    for how, write in {"zip": torch.save, "legacy": _save_legacy, "plain": _pickle}.items():
        damage = partial(_hold_unknown, write, how != "plain")
        yield Case(f"an unknown class in a {how} .bin", "bin", damage, (BIN,))
    for name, held in {
        "a number for a tensor": {NORM: 3},
        "a list for a tensor": {NORM: [1.0] * 16},
        "a nested mapping": {"model": {NORM: torch.ones(16)}},
        "a number for a name": {0: torch.ones(16)},
        "sparse": {NORM: torch.ones(16).to_sparse()},
        "quantised": {NORM: torch.quantize_per_tensor(torch.ones(16), 1.0, 0, torch.qint8)},
        "complex": {NORM: torch.ones(16, dtype=torch.complex64)},
        "on no device": {NORM: torch.ones(16, device="meta")},
        "of all from one number": {NORM: torch.ones(1).expand(16)},
    }.items():
        harmless = name == "of all from one number"
        yield Case(f"{name} in a .bin", "bin", partial(_among, held), (BIN,), harmless)


def _among(held: dict[Any, Any], directory: Path) -> None:
    torch.save({**torch.load(directory / BIN, weights_only=True), **held}, directory / BIN)


def _hold_unknown(write: Callable[..., Any], among: bool, directory: Path) -> None:
    """The class, among all the tensors of the model or alone."""
    tensors = torch.load(directory / BIN, weights_only=True)
    write({**tensors, NORM: Unknown()} if among else Unknown(), directory / BIN)


def _save_legacy(held: Any, file: Path) -> None:
    torch.save(held, file, _use_new_zipfile_serialization=False)


def _pickle(held: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(held))
