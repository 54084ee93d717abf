"""A real ComfyUI server on the CPU, and a client just large enough to test with."""

import json
import os
import re
import socket
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 180
RUN_SECONDS = 240


def environment() -> dict[str, str]:
    """What ComfyUI's processes see: as a user's, without the test run's own Triton interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


class Refused(Exception):
    """The server answered a prompt with 400: `errors` is its JSON."""

    def __init__(self, errors: dict[str, Any]) -> None:
        super().__init__(json.dumps(errors)[:2000])
        self.errors = errors


class Failed(Exception):
    """A prompt ended in an error: the message is the node's own."""


class Interrupted(Exception):
    """A prompt was interrupted."""


class ComfyServer:
    """One ComfyUI process whose models, inputs and outputs live under `base`."""

    def __init__(self, python: str, checkout: Path, base: Path, pack: Path, pack_folder: str) -> None:
        self.base, self.output = base, base / "output"
        for folder in ("models", "input", "output", "custom_nodes"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        link = base / "custom_nodes" / pack_folder
        if not link.is_symlink():
            link.symlink_to(pack, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = base / "server.log"
        self.start_log = ""
        command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
        command += ["--base-directory", str(base), "--disable-api-nodes", "--disable-auto-launch"]
        command += ["--database-url", "sqlite:///:memory:"]
        if frontend := os.environ.get("COMFYUI_FRONTEND"):
            command += ["--front-end-root", str(Path(frontend).resolve())]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=checkout, stdout=log, stderr=subprocess.STDOUT, env=environment()
            )

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                self.start_log = self.log()
                return
            except httpx.TransportError:
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not start within {START_SECONDS} s:\n{self.log()[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def kill(self) -> None:
        """End the process at once, as a crash or a power cut would."""
        self.process.kill()
        self.process.wait()

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=60).raise_for_status().json()

    def post(self, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
        data: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx.post(self.url + path, timeout=60, **data)

    def queue(self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None) -> str:
        """Submit an API prompt, and the canvas it comes from; its id. Raises Refused with the server's errors."""
        prompt_id = str(uuid.uuid4())
        canvas = {"extra_data": {"extra_pnginfo": {"workflow": workflow}}} if workflow else {}
        answer = self.post("/prompt", {"prompt": prompt, "prompt_id": prompt_id, **canvas})
        if answer.status_code == 400:
            raise Refused(answer.json())
        answer.raise_for_status()
        return prompt_id

    def wait(self, prompt_id: str, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """The prompt's history entry once it has ended well; raises Failed or Interrupted otherwise."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                for kind, data in entry["status"]["messages"]:
                    if kind == "execution_error":
                        raise Failed(data["exception_message"].strip())
                    if kind == "execution_interrupted":
                        raise Interrupted(prompt_id)
                return entry
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} took more than {seconds} s:\n{self.log()[-4000:]}")

    def run(self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None) -> dict[str, Any]:
        return self.wait(self.queue(prompt, workflow))

    def files(self, entry: dict[str, Any]) -> list[Path]:
        """Paths of every file that the run's output nodes saved, in node order."""
        values = (value for output in entry["outputs"].values() for values in output.values() for value in values)
        files = (value for value in values if isinstance(value, dict) and "filename" in value)
        return [self.base / file["type"] / file["subfolder"] / file["filename"] for file in files]

    def executed(self, entry: dict[str, Any]) -> set[str]:
        """The nodes that ran and were not taken from the cache."""
        cached = [data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached"]
        return set(entry["prompt"][2]).difference(*cached)

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def free(self) -> None:
        """Unload every model and forget every cached node output."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def resident_bytes(self) -> int:
        """The server process's resident memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def error_of(self, prompt: dict[str, Any]) -> str:
        """The one message with which this prompt fails, when it is submitted or when it runs."""
        try:
            entry = self.run(prompt)
        except Failed as failed:
            return str(failed)
        except Refused as refused:
            nodes = refused.errors["node_errors"].values()
            details = [f"{error['message']}: {error['details']}" for node in nodes for error in node["errors"]]
            return "; ".join(details) or refused.errors["error"]["message"]
        raise AssertionError(f"the prompt ran: {entry['outputs']}")

    def wait_for_steps(self, least: int, total: int, since: int, seconds: float = 120) -> None:
        """Wait until a progress bar that came after position `since` of the log shows `least` of `total` steps."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done = re.findall(rf"Light Forcing: .*?(\d+)/{total} \[", self.log()[since:].replace("\r", "\n"))
            if done and int(done[-1]) >= least:
                return
            time.sleep(0.1)
        raise TimeoutError(f"fewer than {least} of {total} steps within {seconds} s:\n{self.log()[since:][-2000:]}")
