"""The native CPU kernels: C++ beside this file, compiled once for this machine by its own compiler.

The first use compiles (half a minute of processor time, file by file on all cores, once for a machine and a version of
the source) into the user's cache folder, as torch.compile and Triton do for theirs. Where that is impossible (no
compiler, no AVX2, not Linux on x86) the paths in plain torch answer instead, with one warning that says why: right, but
slower.

Environment:
    QGRAFT_CACHE     folder of the compiled kernels (default: $XDG_CACHE_HOME/qgraft or ~/.cache/qgraft)
    QGRAFT_NATIVE=0  do not use them; no warning
    CXX              the compiler (default: c++, g++ or clang++)
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden")
SECONDS = 300  # that the compilation of a file may take
AVX512, VNNI, BF16 = 1, 2, 4


class Unavailable(RuntimeError):
    """Why there are no native kernels here."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None after one warning that says why there are none."""
    if os.environ.get("QGRAFT_NATIVE") == "0":
        return None
    try:
        return _load(build())
    except Unavailable as why:
        warnings.warn(
            f"qgraft: no native CPU kernels, because {why}. The layers run in plain torch instead: right, but slower.",
            stacklevel=2,
        )
        return None


def build(flags: tuple[str, ...] = ()) -> Path:
    """Compile the kernels, unless the cache has them already; the path of the shared library.

    flags: more options for the compiler, after the usual ones. Raises Unavailable with the reason.
    """
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "AMD64"):
        raise Unavailable(f"they are written for Linux on x86-64, and this is {system} on {machine}")
    cpu = _cpu_flags()
    missing = [flag for flag in ("avx2", "fma", "f16c") if flag not in cpu]
    if missing:
        raise Unavailable(f"this processor lacks {', '.join(missing)}")
    compiler, libraries = _compiler(), _openmp()
    command = [compiler, *FLAGS, *flags]
    sources = sorted(SOURCES.iterdir())
    key = hashlib.sha256()
    for part in (_version(compiler), *command, *libraries, " ".join(sorted(cpu)), *(p.read_text() for p in sources)):
        key.update(part.encode() + b"\0")
    target = _cache() / f"kernels-{key.hexdigest()[:20]}.so"
    if not target.exists():
        _compile(command, libraries, target)
    return target


def _compile(command: list[str], libraries: list[str], target: Path) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        print("qgraft: compiling the CPU kernels, once for this machine: 10 to 30 seconds", file=sys.stderr, flush=True)
    try:
        # Linked beside its place and renamed, so that several processes may do this at once.
        with tempfile.TemporaryDirectory(prefix=".kernels-", dir=target.parent) as folder:
            files = sorted(SOURCES.glob("*.cpp"))
            objects = [str(Path(folder) / f"{file.stem}.o") for file in files]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = [[*command, "-c", str(file), "-o", made] for file, made in zip(files, objects, strict=True)]
                list(pool.map(_run, jobs))
            unfinished = Path(folder) / target.name
            _run([*command, "-shared", *objects, *libraries, "-o", str(unfinished)])
            os.replace(unfinished, target)
    except OSError as error:
        raise Unavailable(f"they cannot be written: {error}") from error


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`{command[0]}` could not be run: {error}") from error
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise Unavailable(f"`{command[0]}` could not compile them: {complaint}")


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise Unavailable(f"there is no C++ compiler ({f'CXX={wanted}' if wanted else 'c++, g++ or clang++'}) on the PATH")


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`{compiler}` could not be run: {error}") from error


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError as error:
        raise Unavailable(f"the processor's features cannot be read: {error}") from error
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _openmp() -> list[str]:
    """Options that link against the OpenMP library which torch has loaded: a second one would bring threads of its own,
    beside torch's and deaf to torch.set_num_threads."""
    import torch  # loads its OpenMP library

    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    found = re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*)", maps)
    if not found:
        return []
    # Other packages bring one as well, in a folder called after them: sentencepiece.libs, say.
    home = str(Path(torch.__file__).parent)
    best = min(found, key=lambda path: (not path.startswith(home), ".libs/" in path))
    return [best, f"-Wl,-rpath,{Path(best).parent}"]


def _cache() -> Path:
    """A folder that can be written to; a new temporary one if the user's own cannot."""
    wanted = os.environ.get("QGRAFT_CACHE")
    base = Path(wanted) if wanted else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qgraft"
    try:
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="qgraft-"))


_SHORT = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64}
# Arguments of each function of csrc/*.cpp, in order: pointers, 32-bit and 64-bit integers.
_SIGNATURES = {
    "qg_features": "",
    "qg_w8": "pi pp pi pi lll",
    "qg_w8_group": "pi ppp pi pi llll",
    "qg_w8a8": "pip pppp i pi pi lllll",
    "qg_bitnet": "pi pp pi pi lll",
    "qg_w4_float": "pippi ppi p pi pi pi lllll ii l",
    "qg_svdq_quantize": "pippi llll iii l ppp",
    "qg_svdq": "pippi ppp pi pi pi lllll iii l",
}


def _load(path: Path) -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes = [_SHORT[kind] for kind in arguments.replace(" ", "")]
            function.restype = ctypes.c_int32
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{path} could not be loaded ({error}); remove it to have it compiled again") from error
    lib.features = lib.qg_features()
    return lib
