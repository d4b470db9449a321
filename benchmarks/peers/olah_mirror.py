"""A basis and a task fetched through `olah`, an independent mirror of the Hub, in an environment of its own.

    python benchmarks/peers/olah_mirror.py

A Hub of ours serves a basis and a task on loopback, olah mirrors it, and a client that knows only the mirror loads the
task: its outputs have to be those of a client of the Hub itself. Prints both, and how many requests reached the Hub.
Needs the test extra.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from peft import get_peft_model  # noqa: E402

from subspace_peft import SubspaceConfig, build_basis  # noqa: E402
from tests.conftest import bert, randomise  # noqa: E402
from tests.push_hub import PushHub  # noqa: E402

OLAH = "olah==0.5.4"
CLIENT = """
import subspace_peft
from peft import PeftModel
from tests.conftest import bert, inputs
model = PeftModel.from_pretrained(bert(), "me/task").eval()
config = model.peft_config["default"]
print(repr(model(inputs()).logits.double().sum().item()), config.basis, config.basis_revision)
"""


def client(endpoint: str, home: Path) -> str:
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "SUBSPACE_PEFT_CACHE": str(home / "subspace"),
    }
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
        cwd=ROOT,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stderr}\n{endpoint} did not serve it.")
    return done.stdout.strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"{url} does not answer.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, help="folder of the environment, kept; a temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, PushHub() as hub:
        root = Path(scratch)
        environment = args.env or root / "env"
        if not (environment / "bin" / "olah-cli").is_file():
            venv.create(environment, with_pip=True)
            subprocess.run([environment / "bin" / "python", "-m", "pip", "install", "--quiet", OLAH], check=True)
        basis = build_basis(
            builder="random", base_model=bert(), target_modules=["query", "value"], k=4, progress=False
        )
        basis.save_pretrained(root / "basis")
        sha = hub.put("org/basis", root / "basis")
        model = randomise(get_peft_model(bert(), SubspaceConfig(basis=basis)))
        basis.location, basis.revision = "org/basis", sha
        model.save_pretrained(str(root / "task"))
        hub.put("me/task", root / "task")

        port, netloc = free_port(), hub.url.removeprefix("http://")
        mirror = f"http://127.0.0.1:{port}"
        command = [
            environment / "bin" / "olah-cli",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--hf-scheme",
            "http",
            "--hf-netloc",
            netloc,
            "--hf-lfs-netloc",
            netloc,
            "--mirror-scheme",
            "http",
            "--mirror-netloc",
            f"127.0.0.1:{port}",
            "--mirror-lfs-netloc",
            f"127.0.0.1:{port}",
            "--repos-path",
            root / "repos",
            "--log-path",
            root / "logs",
        ]
        with open(root / "olah.txt", "w") as log:
            server = subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT)
            try:
                wait_for(mirror)
                straight = client(hub.url, root / "one")
                hub.log.clear()
                mirrored = client(mirror, root / "two")
                first = len(hub.gets())
                hub.log.clear()
                again = client(mirror, root / "three")
            finally:
                server.terminate()
                server.wait()
        print(f"from the Hub:       {straight}\nthrough {OLAH}: {mirrored}\nthe same again:     {again}")
        print(f"files that the mirror asked the Hub for: {first} the first time, {len(hub.gets())} the second")
        if not straight == mirrored == again:
            sys.exit("They differ.")


if __name__ == "__main__":
    main()
