"""Jupyter kernels forked from one process that has imported torch and the like.

Those imports are most of the time that a notebook takes on tiny models. `vldnp` is not among them,
and each kernel is a process of its own.

    python warm_kernel.py serve SOCKET        forks a kernel for each request
    python warm_kernel.py SOCKET -f FILE …    is a kernel, as far as Jupyter can see
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


@contextmanager
def kernels(folder: Path):
    """While it lasts, the kernel `python3` of this process's children is a warm one."""
    place = folder / "kernels" / "python3"
    place.mkdir(parents=True)
    address = str(folder / "socket")
    command = [sys.executable, __file__]
    spec = {
        "argv": [*command, address, "-f", "{connection_file}"],
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "metadata": {"supported_encryption": ["curve"]},
        "env": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"},
    }
    (place / "kernel.json").write_text(json.dumps(spec))
    server = subprocess.Popen([*command, "serve", address], stdout=subprocess.PIPE)
    with mock.patch.dict(os.environ, JUPYTER_PATH=str(folder)):
        try:
            assert server.stdout.readline() == b"ready\n"
            yield
        finally:
            server.kill()
            server.wait()
            server.stdout.close()


def serve(address: str) -> None:
    # tqdm and matplotlib look around when they are imported, and must find a notebook.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    names = "ipykernel.zmqshell diffusers ipywidgets open_clip pandas scipy.stats torch torchvision"
    modules = [importlib.import_module(name) for name in (*names.split(), "transformers")]
    classes = "AutoModelForImageTextToText AutoProcessor LlavaForConditionalGeneration"
    assert modules[1].StableDiffusionPipeline  # these are imported when first asked for
    assert all(getattr(modules[-1], name) for name in classes.split())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # kernels that have ended leave nothing behind
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                be_kernel(connection)
            connection.close()


def be_kernel(connection: socket.socket) -> None:
    from ipykernel.kernelapp import IPKernelApp

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(connection.makefile().readline())
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[0] = ""
    # Jupyter kills the process that asked; then the connection ends, and so must the kernel.
    threading.Thread(target=lambda: connection.recv(1) or os._exit(1), daemon=True).start()
    try:
        IPKernelApp.launch_instance(argv=request["arguments"])
    finally:
        os._exit(0)


def ask(address: str, *arguments: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    environment = dict(os.environ)
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": environment}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        connection.sendall(json.dumps(request).encode() + b"\n")
        connection.recv(1)  # comes to an end with the kernel


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "serve" else ask(*sys.argv[1:])
