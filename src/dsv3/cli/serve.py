"""`dsv3 serve`: a model behind an OpenAI-compatible server."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from dsv3.cli.options import PATH, device_option, drafts_option, ema_option, fp8_cache_option
from dsv3.errors import UserError
from dsv3.serving import settings as limits
from dsv3.serving.settings import Settings

LIMITS = f"""
\b
Limits of one request, fixed: n {limits.MAX_N}, prompts {limits.MAX_PROMPTS}, stop texts {limits.MAX_STOPS} of {limits.MAX_STOP_LENGTH} characters,
logprobs {limits.MAX_TOP_LOGPROBS}, messages {limits.MAX_MESSAGES}, tools {limits.MAX_TOOLS}, logit_bias {limits.MAX_LOGIT_BIAS} tokens, JSON schemas {limits.MAX_SCHEMA_BYTES >> 10} KiB and {limits.MAX_SCHEMA_DEPTH} levels,
headers {limits.MAX_HEADER_BYTES >> 10} KiB, {Settings.prepare_seconds:g} s to tokenise and {Settings.prepare_seconds:g} s to compile a schema, {Settings.body_seconds:g} s for the body to arrive,
{Settings.send_seconds:g} s without reading before a client is given up.
"""


@click.command(epilog=LIMITS)
@click.argument("checkpoint", type=PATH)
@click.option(
    "--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 is everybody's, so give a key with it."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000)
@click.option("--api-key", "api_keys", multiple=True, envvar="DSV3_API_KEY", show_envvar=True,
              help="Asked for by every route but /health and the page; several separate tenants.")  # fmt: skip
@click.option("--name", help="The model's name in requests.  [default: the directory's]")
@click.option("--dtype", default="auto", help="What weights become: auto, bf16 or fp32.")
@click.option("--max-model-len", type=click.IntRange(2), help="Tokens of prompt and answer.  [default: the model's]")
@click.option("--max-num-seqs", type=click.IntRange(1), default=256, help="Sequences in one pass.")
@click.option("--max-num-batched-tokens", type=click.IntRange(1), default=8192, help="Tokens in one pass.")
@click.option("--max-waiting", type=click.IntRange(0), default=256,
              help="Sequences that may wait beyond those; more are refused with 429.")  # fmt: skip
@click.option("--cache-gib", type=click.FloatRange(0, min_open=True),
              help="Memory of the latent cache.  [default: most of what is free on a GPU, 0.25 on a CPU]")  # fmt: skip
@fp8_cache_option
@drafts_option
@click.option("--prefix-caching/--no-prefix-caching", default=True)
@click.option("--max-body-mib", type=click.FloatRange(0, min_open=True), default=4.0, help="Of a request.")
@click.option("--drain-seconds", type=click.IntRange(0), default=60, help="For open answers to end after SIGTERM.")
@ema_option
@device_option
def serve(
    checkpoint: Path, host: str, port: int, api_keys: tuple[str, ...], name: str | None, dtype: str, max_waiting: int,
    cache_gib: float | None, max_body_mib: float, drain_seconds: int, ema: bool, device: str, **engine_options: Any,
) -> None:  # fmt: skip
    """Serves the model in CHECKPOINT (a run, a checkpoint or a Hugging Face directory) as OpenAI's API, with a chat page at /.

    Ctrl-C or SIGTERM ends it when open answers are complete.
    """
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.inference.engine import Engine, EngineConfig
    from dsv3.weights.opening import load_model

    try:
        from dsv3.serving.app import make_app
        from dsv3.serving.server import local_hosts, run
    except ImportError as error:
        raise UserError(f"the server needs the package {error.name}: pip install 'dsv3[serve]'") from None
    if not all(api_keys):
        raise UserError("an --api-key is empty: leave it out, or give one")
    # In a thread that ends: beside OpenMP's workers of this one, those of the engine's thread would be more than there are cores, and
    # sleep between any two operations.
    with ThreadPoolExecutor(1) as loading:
        model, directory = loading.submit(load_model, checkpoint, dtype=dtype, device=device, ema=ema).result()
    tokenizer = Tokenizer.load(directory)
    config = EngineConfig(cache_bytes=None if cache_gib is None else int(cache_gib * 2**30), **engine_options)
    engine = Engine(model, tokenizer, config)
    settings = Settings(
        name=name or checkpoint.resolve().name, max_model_len=engine.max_model_len, capacity=config.max_num_seqs + max_waiting,
        api_keys=api_keys, hosts=local_hosts(host), max_body_bytes=int(max_body_mib * 2**20),
    )  # fmt: skip
    app = make_app(engine, tokenizer, directory, model.config.vocab_size, settings)
    click.echo(
        f"{settings.name} on http://{host}:{port}, {engine.max_model_len} tokens a request; Ctrl-C ends", err=True
    )
    run(app, host, port, drain_seconds)
