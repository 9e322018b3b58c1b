"""The command `vlcache serve`."""

import logging
import os
import socket
import threading
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from vlcache_jax.cache.methods import DEFAULT_METHOD
from vlcache_jax.cli import options
from vlcache_jax.cli.terminal import (
    note,
    open_model,
    print_result,
    progress_line,
    show_error,
    user_errors,
)
from vlcache_jax.errors import reason

if TYPE_CHECKING:
    from vlcache_jax.serving import Engine
    from vlcache_jax.serving.sizes import Sizes

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="VLCACHE_API_KEY", help="Key that requests have to send; none by default."
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen at other addresses than loopback, keyless.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Of the model in requests; what was loaded by default.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help=f"{options.METHOD_HELP} {options.EACH} that is served."),
    ] = None,
    kv_budget: Annotated[
        str,
        typer.Option(
            help="What a slot has room for, and what is kept where a request does not say: a share "
            "of the cache such as 0.1, or tokens per layer such as 256tok."
        ),
    ] = "0.1",
    kv_bits: options.KvBits = None,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Answers at a time; by default as many as the memory holds."),
    ] = None,
    new_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Most tokens of an answer. Give the option up to three times: slots of each "
            "length are made; 128 and 512 by default.",
        ),
    ] = None,
    prompt_rows: Annotated[
        int, typer.Option(min=1, help="Most tokens of a prompt, those of its pictures included.")
    ] = 2048,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, help="Rows of a prompt that are run between two decode chunks.")
    ] = 512,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    logprobs: Annotated[
        int, typer.Option(min=0, max=20, help="Most top_logprobs of a request; 0 for none.")
    ] = 20,
    memory_fraction: Annotated[
        float, typer.Option(help="Share of the device's memory that is used.")
    ] = 0.8,
    prefix_memory: Annotated[
        float,
        typer.Option(min=0, help="GB in which pictures and texts that requests share are kept."),
    ] = 0.5,
    prefix_store: Annotated[str, typer.Option(help="Where that lies: device or host.")] = "device",
    images_first: Annotated[
        bool,
        typer.Option(
            "--images-first",
            help="Move pictures in front of the text of their message: text in front of a picture "
            "leaves VL-Cache few rows to look from.",
        ),
    ] = False,
    allow_remote_images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Fetch pictures from this host; from none by default. Give the option once for "
            "each.",
        ),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write what is asked into the log.")
    ] = False,
    stop_seconds: Annotated[
        int, typer.Option(min=0, help="Seconds that answers may take once the server is to stop.")
    ] = 30,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say how many sequences fit, read no weights and stop."),
    ] = False,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    backend: options.Backend = None,
    as_json: options.AsJson = False,
) -> None:
    """Answer requests over HTTP as the OpenAI API does, many at once, on compressed caches.

    A page to try the model is at the address itself. /health says when all programs are ready: no
    request compiles. Requests may name a method that is served, and any budget, as kv_method and
    kv_budget.

    Example: vlcache serve demo-small --method consensus --kv-budget 0.2

    Example: vlcache serve MODEL --dry-run --kv-bits 2
    """
    with user_errors(), ExitStack() as stack:
        _check_packages()
        from vlcache_jax.cache.methods import make_method
        from vlcache_jax.cache.quantizers import make_quantizer
        from vlcache_jax.loading import read_config
        from vlcache_jax.serving import METHODS, Engine
        from vlcache_jax.serving.http import Pictures, ServerSettings, create_app
        from vlcache_jax.serving.sizes import device_memory, plan_slots

        if host not in LOOPBACK and api_key is None and not insecure:
            raise ValueError(
                f"--host {host} can be reached by others: set --api-key (or VLCACHE_API_KEY), or "
                "say --insecure"
            )
        if api_key is not None and (not api_key.strip() or not api_key.isascii()):
            raise ValueError("--api-key is empty, or has other characters than ASCII")
        lengths = tuple(new_tokens or (128, 512))
        if len(set(lengths)) > 3:
            raise ValueError("give --new-tokens at most three times")
        quantizer, prefix_bytes = make_quantizer(kv_bits), int(prefix_memory * 1e9)
        names = list(dict.fromkeys(method or METHODS))
        methods = [
            make_method(each, None if each == "full" else kv_budget, quantizer) for each in names
        ]
        config, kind = read_config(model, dtype, revision)
        sizes = plan_slots(
            config,
            kind,
            memory=device_memory(memory_fraction),
            prompt_rows=prompt_rows,
            budget=kv_budget,
            quantizer=quantizer,
            new_tokens=lengths,
            slots=slots,
            whole="full" in names,
            prefix_bytes=prefix_bytes,
        )
        if dry_run:
            print_result(asdict(sizes), sizes_table(sizes), as_json)
            return
        link = stack.enter_context(_bound(host, port))
        vlm, progress = open_model(model, revision, dtype, backend)
        with progress:
            engine = Engine(
                vlm,
                methods,
                sizes.groups,
                prompt_rows=sizes.rows,
                prefill_chunk=prefill_chunk,
                queue=queue,
                logprobs=logprobs,
                prefix_bytes=prefix_bytes,
                prefix_store=prefix_store,
            )
        longest = config.text.max_positions + 1 - sizes.rows
        settings = ServerSettings(
            name or model,
            DEFAULT_METHOD if DEFAULT_METHOD in names else names[0],
            kv_budget,
            api_key,
            images_first,
            log_prompts,
            default_tokens=max(1, min(max(lengths), longest)),
            bits=kv_bits,
        )
        app = create_app(vlm, engine, settings, Pictures(allow_remote_images or ()))
        _run(app, engine, progress, link, stop_seconds)


def _check_packages() -> None:
    for name in ("fastapi", "prometheus_client", "uvicorn"):
        if find_spec(name) is None:
            raise ValueError(f"{name} is not installed: pip install 'vlcache-jax[serve]'")


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address."""
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=kind)
    except OSError as error:
        raise ValueError(
            f"cannot listen at {host}:{port} ({reason(error)}): choose another --port or --host"
        ) from None


def _run(
    app: Any, engine: "Engine", progress: Progress, link: socket.socket, stop_seconds: int
) -> None:
    """Listen, compile beside, and serve until somebody ends it."""
    import uvicorn

    from vlcache_jax.serving.http import JsonLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    log = logging.getLogger("vlcache.serve")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=stop_seconds,
        )
    )
    failed: list[BaseException] = []

    def begin() -> None:
        try:
            show = progress_line(progress, "compiling")
            with progress:
                engine.warm_up(show)
        except BaseException as error:
            failed.append(error)
            server.should_exit = True
            return
        host, port, *_ = link.getsockname()
        where = f"[{host}]" if ":" in host else host
        note(f"ready: http://{where}:{port}/")
        engine.join()
        failed.extend([engine.error] if engine.error else [])
        server.should_exit = True

    threading.Thread(target=begin, daemon=True).start()
    server.run([link])
    if not engine.ready and not failed:
        os._exit(130)  # in the midst of compiling, which nothing interrupts
    engine.close(drain=False)
    if failed:
        show_error(failed[0])
        raise typer.Exit(1)


def sizes_table(sizes: "Sizes") -> Table:
    """What fits, for a terminal."""
    from vlcache_jax.results.display import two_columns
    from vlcache_jax.results.report import human_bytes

    rows = {
        "memory": f"{human_bytes(sizes.needed)} of {human_bytes(sizes.memory)}",
        "prompts": f"up to {sizes.rows} tokens",
    }
    for group in sizes.groups:
        rows |= {f"{group.slots} slots for": str(group)} if group.slots else {}
    rows["sequences that fit, full cache"] = str(sizes.fit_full)
    rows["sequences that fit, as asked"] = str(sizes.fit_kept)
    return two_columns(rows)
