"""The demo works as printed, touches nothing of the person's own, leaves nothing."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx

from relay import __version__
from relay.assembly import listen
from relay.demo import HOST, OPS_PORT, RELAY_PORT, SANDBOX_PORT, SHOP_PORT
from tests.processes import processes
from tests.programs import RELAY, Program, running

USUAL = (RELAY_PORT, SANDBOX_PORT, SHOP_PORT, OPS_PORT)
CLOSING = "The demo has ended; nothing of it is left.\n"


@contextmanager
def demo(place: Path, **env: str) -> Iterator[Program]:
    """A demo whose temporary directory is `place`, and which leaves it empty."""
    place.mkdir()
    with running([*RELAY, "demo"], env={"TMPDIR": str(place), **env}) as program:
        yield program
    assert list(place.iterdir()) == []
    assert processes(mentions=str(place)) == {}


def addresses(program: Program) -> dict[str, str]:
    program.wait_for("^  curl .*$", within=30)
    return {
        "shop": program.wait_for(r"start here +(http\S+)$")[1],
        "relay": program.wait_for(r"takes beacons on +(http\S+)/track ")[1],
        "ready": program.wait_for(r"\((http\S+/readyz)\)$")[1],
        "sandbox": program.wait_for(r"would receive +(http\S+)$")[1],
    }


def received(sandbox: str) -> list[dict[str, object]]:
    found = httpx.get(f"{sandbox}/_sandbox/events").json()["events"]
    assert isinstance(found, list)
    return found


def delivered(sandbox: str, *, within: float = 2.0) -> dict[str, object]:
    deadline = time.monotonic() + within
    while not (events := received(sandbox)):
        assert time.monotonic() < deadline, f"nothing arrived within {within} s"
        time.sleep(0.01)
    [event] = events
    return event


def send(curl_line: str) -> int:
    """Run a printed line as it stands; without curl, send what it would."""
    words = shlex.split(curl_line)
    assert words[:3] == ["curl", "-X", "POST"]
    if shutil.which("curl"):
        show = ["--silent", "--output", os.devnull, "--write-out", "%{http_code}"]
        return int(subprocess.check_output([*words, *show], text=True))
    headers = dict(
        words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H"
    )
    data = words[words.index("--data") + 1]
    return httpx.post(words[-1], headers=headers, content=data).status_code


def test_everything_it_prints_works(tmp_path: Path) -> None:
    with demo(tmp_path / "tmp") as program:
        at = addresses(program)
        for url in (at["shop"], at["sandbox"], at["ready"]):
            assert httpx.get(url).status_code == 200
        page = httpx.get(at["shop"])
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert at["sandbox"] in page.text
        assert "{{" not in page.text

        # The shop is a way to the relay, by each name of this machine.
        for shop in (at["shop"], at["shop"].replace(HOST, "localhost")):
            answer = httpx.post(
                f"{at['shop']}/track", content="?", headers={"Origin": shop}
            )
            assert answer.json()["reason"] == "malformed_json"

        assert send(program.wait_for("^  (curl .*)$")[1]) == 202
        event = delivered(at["sandbox"])
        assert event["body"] == {
            "event": "cart_abandoned",
            "customer": {"source_id": "u1"},
        }
        headers = event["headers"]
        assert isinstance(headers, dict)
        assert headers.pop("host") == at["sandbox"].removeprefix("http://")
        assert headers.pop("content-length") == str(event["size"])
        assert headers.pop("user-agent").startswith(f"voucherify-relay/{__version__}")
        assert headers.pop("x-client-token")  # masked
        assert headers == {
            "x-client-application-id": "sandbox-application",
            "origin": "https://shop.example",
            "x-voucherify-channel": f"relay:{__version__}",
            "content-type": "application/json",
            "accept": "application/json",
        }
        assert httpx.get(f"{at['sandbox']}/_sandbox/unexpected").json() == {
            "unexpected": []
        }
        with httpx.Client() as browser:  # pages left open keep it from nothing
            for url in (at["shop"], at["sandbox"], at["ready"], f"{at['relay']}/"):
                browser.get(url)
            began = time.monotonic()
            assert program.stop() == 0
            assert time.monotonic() - began < 5
        assert program.said.endswith(CLOSING)


def test_it_needs_no_port_and_reads_no_setting_of_the_person(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("RELAY_ORIGIN=https://real.example\nRELAY_TTL=x\n")
    own = {
        "RELAY_ENV_FILE": str(tmp_path / "env"),
        "RELAY_CLUSTER": "api",
        "RELAY_CLIENT_TOKEN": "S3CRET-token",
        "RELAY_REDIS_URL": "redis://S3CRET@127.0.0.1:9",
        "RELAY_PORT": "not a port",
        "RELAY_TRACK_PATH": "/elsewhere",
        "RELAY_DATA_DIR": str(tmp_path / "own"),
        "RELAY_LOG_FORMAT": "nonsense",
        "RELAY_TYPO": "S3CRET",
    }
    with ExitStack() as stack:
        for port in USUAL:
            with suppress(OSError):  # somebody else has it, which is as good
                stack.enter_context(listen(HOST, port))
        program = stack.enter_context(demo(tmp_path / "tmp", **own))
        at = addresses(program)
        ports = {int(re.findall(r":(\d+)", url)[0]) for url in at.values()}
        assert len(ports) == len(USUAL)
        assert not ports & set(USUAL)
        assert send(program.wait_for("^  (curl .*)$")[1]) == 202
        headers = delivered(at["sandbox"])["headers"]
        assert isinstance(headers, dict)
        assert headers["origin"] == "https://shop.example"
        assert program.stop() == 0
        assert "S3CRET" not in program.said
        assert not (tmp_path / "own").exists()


def test_ctrl_c_ends_it_at_any_moment(tmp_path: Path) -> None:
    with demo(tmp_path / "ready") as program:
        addresses(program)
        program.process.send_signal(signal.SIGINT)
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(20) == 0
        assert program.said.endswith(CLOSING)
    with demo(tmp_path / "early") as program:
        program.wait_for("embedded.started")
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(20) == 0
        assert "Traceback" not in program.said, program.said
