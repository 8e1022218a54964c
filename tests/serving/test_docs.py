"""docs/serving.md says what is there, and its commands do what it says."""

import re
import subprocess
from pathlib import Path

import click

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_curl_examples(shared):
    client, _ = shared
    [block] = [block for language, block in BLOCKS if language == "bash" and "curl" in block]
    script = block.replace("http://127.0.0.1:8000", str(client.base_url))
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert '"object":"text_completion"' in done.stdout
    assert '"choices":[],"usage":{' in done.stdout
    assert done.stdout.endswith("data: [DONE]\n\n")


def test_the_example_without_a_server(directory, capsys):
    [example] = [block for language, block in BLOCKS if language == "python" and "LLM" in block]
    exec(example.replace("runs/quickstart", str(directory)), {})
    assert len(capsys.readouterr().out) > 30


def test_every_metric_is_in_the_table(shared):
    client, _ = shared
    client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    families = re.findall(
        r"^# TYPE vllm:(\w+) (?:counter|gauge|histogram)$", client.get("/metrics").text, flags=re.MULTILINE
    )
    table = set(re.findall(r"`(\w+)`", TEXT[TEXT.index("## Metrics") : TEXT.index("## Security")]))
    assert families
    assert {name for name in families if not name.endswith("_created")} <= table


def test_every_option_is_in_the_table():
    from dsv3.cli.serve import serve

    options = [
        name for each in serve.params if isinstance(each, click.Option) for name in (*each.opts, *each.secondary_opts)
    ]
    assert len(options) > 15
    assert [name for name in options if f"`{name}`" not in TEXT] == []
