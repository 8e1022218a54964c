"""Clients of others against a running server, in the environment that `make prove` makes from tests/clients.txt."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-clients" / "bin"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"enum": [1]}}}},
}

pytestmark = [
    pytest.mark.prove,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not ENVIRONMENT.exists(), reason="no .venv-clients here: make prove makes it"),
]


@pytest.fixture(scope="module")
def address(start, directory):
    """Of a server with speculation."""
    _, client = start("--name", "debug", "--num-speculative-tokens", "1")
    return str(client.base_url).rstrip("/")


def run(program, *arguments, cwd):
    """stdout of a program of the clients' environment."""
    done = subprocess.run(
        [ENVIRONMENT / program, *arguments],
        cwd=cwd,
        env={**os.environ, **OFFLINE},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def script(text, address, tmp_path):
    return run("python", "-c", text.replace("http://127.0.0.1:8000", address), cwd=tmp_path)


def test_the_openai_example_of_the_documents(address, tmp_path):
    text = (ROOT / "docs" / "serving.md").read_text()
    [example] = (each for each in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "openai" in each)
    script(example, address, tmp_path)


def test_openai(address, tmp_path):
    text = f"""
import openai
client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", max_retries=0)
hi = dict(model="debug", messages=[{{"role": "user", "content": "hi"}}], max_tokens=8)
whole = client.chat.completions.create(**hi, logprobs=True, top_logprobs=2, n=2, seed=3, temperature=0)
assert len(whole.choices) == 2 and len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens // 2
*chunks, usage = client.chat.completions.create(**hi, temperature=0, stream=True, stream_options={{"include_usage": True}})
assert "".join(each.choices[0].delta.content or "" for each in chunks) == whole.choices[0].message.content
assert usage.usage.completion_tokens == 8
called = client.chat.completions.create(**hi | dict(max_tokens=30), tools=[{TOOL}], tool_choice={{"type": "function", "function": {{"name": "add"}}}})
assert called.choices[0].message.tool_calls[0].function.name == "add"
echo = client.completions.create(model="debug", prompt=["def", "class"], max_tokens=3, logprobs=2, echo=True)
assert echo.choices[1].text.startswith("class") and echo.choices[1].logprobs.token_logprobs[0] is None
for wrong, error in ((dict(model="none"), openai.NotFoundError), (dict(temperature=9), openai.BadRequestError)):
    try:
        client.chat.completions.create(**hi | wrong)
        raise SystemExit(f"{{wrong}} was served")
    except error:
        pass
"""
    script(text, address, tmp_path)


def test_litellm_and_langchain(address, tmp_path):
    text = """
import litellm
from langchain_openai import ChatOpenAI, OpenAI
base = dict(base_url="http://127.0.0.1:8000/v1", api_key="none", max_tokens=6)
hi = dict(model="openai/debug", messages=[{"role": "user", "content": "hi"}], temperature=0, **base)
text = litellm.completion(**hi).choices[0].message.content
assert "".join(each.choices[0].delta.content or "" for each in litellm.completion(**hi, stream=True)) == text
chat = ChatOpenAI(model="debug", temperature=0, **base)
assert chat.invoke("hi").content == text == "".join(each.content for each in chat.stream("hi"))
OpenAI(model="debug", **base).invoke("def ")
"""
    script(text, address, tmp_path)


def test_lm_eval(address, directory, tmp_path):
    (tmp_path / "items.jsonl").write_text('{"q": "def add(a, b):", "a": [" return", " banana"], "gold": 0}\n' * 4)
    task = {
        "task": "pick", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{a}}",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "pick.yaml").write_text(json.dumps(task))
    model = f"model=debug,base_url={address}/v1/completions,tokenizer={directory},tokenized_requests=True"
    out = run(
        "lm-eval", "run", "--model", "local-completions", "--model_args", model, "--tasks", "pick", "--include_path", str(tmp_path),
        cwd=tmp_path,
    )  # fmt: skip
    assert re.search(r"\|acc +\|", out)


def test_guidellm(address, directory, tmp_path):
    out = run(
        "guidellm", "run", "--backend", f"kind=openai_http,target={address},model=debug", "--profile", "kind=concurrent,streams=4",
        "--constraint", "kind=max_requests,count=8", "--tokenizer", f"kind=huggingface_auto,model={directory}",
        "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16", cwd=tmp_path,
    )  # fmt: skip
    assert "Benchmarking complete" in out


@pytest.mark.long
def test_schemathesis_finds_no_fault_of_ours(address, tmp_path):
    out = run(
        "schemathesis", "run", f"{address}/openapi.json", "--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--max-examples", "40",
        "--request-timeout", "60", cwd=tmp_path,
    )  # fmt: skip
    assert "passed" in out


def test_curl_sees_server_sent_events(address):
    body = '{"prompt": "a", "max_tokens": 3, "stream": true}'
    command = ["curl", "-sNi", f"{address}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    head, _, events = out.replace("\r\n", "\n").partition("\n\n")
    assert "content-type: text/event-stream" in head
    assert re.fullmatch(r"(data: \{.*\}\n\n)+data: \[DONE\]\n\n", events)
