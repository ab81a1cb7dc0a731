"""Make torch believe in a CUDA device, for forward and backward passes on FakeTensorMode's "cuda" tensors.

    load_stubs()     # before torch is imported
    import torch

FakeTensorMode keeps shapes, dtypes and devices and computes nothing. On a build of torch without CUDA, its "cuda"
tensors go forward, but autograd asks for a device guard and an accelerator. Two small C++ files provide those. They are
compiled once per release of torch, in about four seconds. A CUDA build has both, even without a GPU.
"""

import ctypes
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ACCELERATOR = """
#include <cstdint>
#include <optional>
namespace c10 { enum class DeviceType : std::int8_t { CPU = 0, CUDA = 1 }; }
namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
}
"""
GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
c10::Device device() { return c10::Device(c10::DeviceType::CUDA, 0); }
c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  int getNumGPUs() const override { return 1; }
};
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
}
namespace at { REGISTER_CUDA_HOOKS(CUDAHooks) }
"""


class StubsUnavailable(Exception):
    """The reason why fake CUDA tensors can't be had here."""


def load_stubs() -> None:
    """Load the stubs into this process, and compile them first where that hasn't been done.

    Raises:
        StubsUnavailable: there is no C++ compiler, or they don't compile with this release of torch.
    """
    assert "torch" not in sys.modules, "one of the stubs must be loaded before torch's own library"
    (home,) = importlib.util.find_spec("torch").submodule_search_locations
    version = runpy.run_path(str(Path(home, "version.py")))
    if version["cuda"] is not None:
        return
    if sys.platform != "linux":
        raise StubsUnavailable("the stubs take the place of one of torch's symbols, which works on Linux alone")
    linked = ["-I", f"{home}/include", "-L", f"{home}/lib", "-lc10", "-ltorch_cpu"]
    try:
        # the first replaces torch's function, since it is loaded before it; the second needs torch's libraries
        ctypes.CDLL(str(_compile("accelerator", ACCELERATOR, version["__version__"], [])), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(f"{home}/lib/libtorch_cpu.so")
        ctypes.CDLL(str(_compile("guard", GUARD, version["__version__"], linked)))
    except OSError as error:
        raise StubsUnavailable(f"the stubs don't load with torch {version['__version__']}: {error}") from error


def _compile(name: str, source: str, version: str, options: list[str]) -> Path:
    """Compile a library into the user's cache; processes that do so at the same time don't disturb each other."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "t5tune-tests")
    library = cache / f"{name}-{version}-{hashlib.sha256(source.encode()).hexdigest()[:12]}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise StubsUnavailable(f"{compiler}: no such C++ compiler")
    cache.mkdir(parents=True, exist_ok=True)
    own = library.with_suffix(f".{os.getpid()}")
    command = [compiler, "-x", "c++", "-", "-O0", "-shared", "-fPIC", "-std=c++20", "-o", str(own), *options]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StubsUnavailable(f"the stubs don't compile with torch {version}: {done.stderr[:500]}")
    own.replace(library)
    return library
