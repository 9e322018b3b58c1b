"""Fixtures that several parts of the suite share."""

import os
import shutil
from pathlib import Path

if not any(Path("/dev").glob("nvidia[0-9]*")):
    # Without a GPU the CUDA plugin starts only where nobody asks it for one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Without LLVM's optimisations tiny models compile in half the time, and run little slower.
    # XLA's own passes (fusion, copies, buffers) run all the same, as do all of a GPU's. Processes
    # that a test starts inherit it; =0 brings back the code that users get.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Compiled programs are kept for the tests that need the same ones, in this run and the next. Each
# process of tests has a folder of its own: JAX writes them unlocked.
KEPT = Path(__file__).parents[1] / ".pytest_cache" / "programs"
if Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", KEPT)).is_relative_to(KEPT):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(KEPT / worker)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

from tests import gguf_files, thinned
from tests.model_files import config_json, decoder_json, write_tiny
from tests.tiny import VIDEO_TOKEN_ID, text_tokenizer, tiny_pinpoints, tiny_processor
from tests.tiny_qwen import qwen_json, qwen_tokenizer, save_processor
from vlcache_jax.checkpoints.changed import Published
from vlcache_jax.files import sha256

if os.environ.get("JAX_PLATFORMS") == "cpu" and jax.__version_info__ < (0, 11):
    # The older code generator of fusions takes half the time again. Later releases have but one.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")


pytest_collection_modifyitems = thinned.pytest_collection_modifyitems


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Each compiled program takes maps of memory, of which a process of Linux may have 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 16_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny LLaVA-NeXT directory with random weights and a processor; made without torch."""
    config = config_json()
    config["text_config"] |= {"vocab_size": 264, "max_position_embeddings": 1024}
    config["vision_config"] |= {"image_size": 56}
    config["image_grid_pinpoints"] = [list(pair) for pair in tiny_pinpoints()]
    path = tmp_path_factory.mktemp("model") / "tiny"
    return write_tiny(path, config, tiny_processor("llava_next"))


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory):
    """A tiny Llama directory with random weights and a tokenizer; made without torch."""
    config = decoder_json() | {"vocab_size": 264, "max_position_embeddings": 1024}
    return write_tiny(tmp_path_factory.mktemp("text") / "tiny", config, text_tokenizer())


@pytest.fixture(scope="session")
def onevision_dir(tmp_path_factory):
    """A tiny LLaVA-OneVision directory with random weights and a processor."""
    family = "llava_onevision"
    pinpoints = [list(pair) for pair in tiny_pinpoints(56, family)]
    config = config_json() | {"model_type": family, "image_grid_pinpoints": pinpoints}
    tower = {"model_type": "siglip_vision_model", "image_size": 56, "vision_use_head": False}
    config["vision_config"] |= tower
    text = {"model_type": "qwen2", "vocab_size": 264, "max_position_embeddings": 1024}
    config["text_config"] |= text
    config["video_token_index"] = VIDEO_TOKEN_ID
    path = tmp_path_factory.mktemp("onevision") / "tiny"
    return write_tiny(path, config, tiny_processor(family))


@pytest.fixture(scope="session")
def qwen_dir(tmp_path_factory):
    """A tiny Qwen2.5-VL directory with random weights and the files of its processor."""
    return write_qwen(tmp_path_factory.mktemp("qwen") / "tiny", "qwen2_5_vl")


@pytest.fixture(scope="session")
def qwen3_dir(tmp_path_factory):
    """A tiny Qwen3-VL directory likewise."""
    return write_qwen(tmp_path_factory.mktemp("qwen3") / "tiny", "qwen3_vl")


def write_qwen(path, family):
    write_tiny(path, qwen_json(family), qwen_tokenizer())
    save_processor(path, family)
    return path


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A tiny decoder in a package, as the published one is; found as long as the tests run."""
    folder = tmp_path_factory.mktemp("packages")
    package = folder / "tiny_decoder"
    package.mkdir()
    (package / "__init__.py").touch()
    tokenizer = gguf_files.chat()
    tensors = gguf_files.hub_tensors(len(tokenizer["tokenizer.ggml.tokens"]), tied=True)
    keys = gguf_files.metadata(context_length=4096)
    file = gguf_files.write(package / "tiny.gguf", tensors, keys, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield Published("tiny-decoder", "1.0", sha256(file))


@pytest.fixture
def compilations():
    """Counts the programs that XLA compiles, as JAX itself reports them."""
    seen = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def pytest_sessionstart(session):
    """Programs of code that has long been changed are thrown away."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if sum(file.stat().st_size for file in KEPT.rglob("*") if file.is_file()) > 2**30:
        shutil.rmtree(KEPT)
