"""What is served, and within which limits."""

from dataclasses import dataclass, field

MAX_N = 64
"""Choices of one prompt."""
MAX_PROMPTS = 256
"""Prompts of one completion request."""
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
"""Characters of one stop text."""
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_LOGIT_BIAS = 1024
MAX_SCHEMA_BYTES = 64 * 1024
"""JSON of one schema, a tool's parameters included."""
MAX_SCHEMA_DEPTH = 32
MAX_HEADER_BYTES = 32 * 1024


@dataclass(frozen=True)
class Settings:
    """A server's options and time limits; `dsv3 serve --help` lists them."""

    name: str
    """The model's name in requests and answers."""
    max_model_len: int
    """Tokens of a prompt and its continuation."""
    capacity: int = 320
    """Sequences in the engine, running and waiting; requests beyond that are refused with 429."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Bearer tokens, one of which every route but `/health` and `/` requires; empty: none required. Each key is a tenant with its
    own cached prefixes."""
    hosts: tuple[str, ...] | None = None
    """Accepted `Host` headers, so that no foreign page reaches a local server through DNS rebinding; None: all."""
    max_body_bytes: int = 4 * 1024 * 1024
    body_seconds: float = 30.0
    """Time for a body to arrive."""
    prepare_seconds: float = 10.0
    """Time to tokenise a request, and again to compile its grammar."""
    keep_alive_seconds: float = 15.0
    """A stream without tokens sends a comment this often, so that proxies keep it open."""
    send_seconds: float = 60.0
    """A client that reads nothing for so long is disconnected."""
