"""The operations that decoding consists of, for few rows at a time: a product that streams each weight once, attention over
the valid part of the cache, the norm and the gate.

On the CPU they are a small C++ library, built with g++ at first use and cached. Every output row is computed by the same
sequence of operations however many rows go with it, so drafting, verifying and plain decoding agree bit for bit. Where the
library can't be built, and on other devices, plain PyTorch does the same work, slower and without that promise.
"""
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

MAX_ROWS = 16  # beyond, in a prompt's pass, PyTorch's matrix product is the faster one

SOURCE = r"""
#include <torch/library.h>
#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <cmath>
#include <vector>

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float vec __attribute__((vector_size(W * 4), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef uint16_t half_vec __attribute__((vector_size(W * 2), aligned(2)));

static inline vec load(const float* p) { return *(const vec*)p; }
static inline vec load(const c10::BFloat16* p) {
  return (vec)(__builtin_convertvector(*(const half_vec*)p, ivec) << 16);  // bfloat16 is the upper half of a float
}
// Halves are added until one number is left: five short steps, where adding the elements in turn would wait for W.
typedef float vec8 __attribute__((vector_size(32), may_alias));
typedef float vec4 __attribute__((vector_size(16), may_alias));
static inline float sum(vec v) {
#ifdef __AVX512F__
  vec8 a = ((vec8*)&v)[0] + ((vec8*)&v)[1];
#else
  vec8 a = v;
#endif
  vec4 b = ((vec4*)&a)[0] + ((vec4*)&a)[1];
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// y[m, n] = sum over k of x[m, k] w[n, k], for R weight rows and M input rows at a time. Each (m, n) has one accumulator
// and one order of additions, whatever R and M are.
template <int R, int M, typename T>
static void block(const float* x, const T* w, T* y, int64_t N, int64_t K) {
  vec acc[R][M] = {};
  int64_t k = 0;
  for (; k + W <= K; k += W) {
    vec row[R];
    for (int r = 0; r < R; r++) row[r] = load(w + r * K + k);
    for (int m = 0; m < M; m++) {
      vec v = load(x + m * K + k);
      for (int r = 0; r < R; r++) acc[r][m] += row[r] * v;
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float s = sum(acc[r][m]);
      for (int64_t j = k; j < K; j++) s = std::fma((float)w[r * K + j], x[m * K + j], s);
      y[m * N + r] = (T)s;
    }
}

template <int M, typename T>
static void rows(const float* x, const T* w, T* y, int64_t N, int64_t K) {
#ifdef __AVX512F__  // R * M accumulators, as the registers allow; measured
  constexpr int R = M <= 3 ? 8 : M == 4 ? 6 : M == 5 ? 5 : 3;
#else
  constexpr int R = M == 1 ? 8 : M <= 3 ? 4 : M <= 7 ? 2 : 1;
#endif
  at::parallel_for(0, (N + R - 1) / R, 1 + 32768 / (K * R), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * R; n < std::min(end * R, N); n += R)
      if (n + R <= N) block<R, M>(x, w + n * K, y + n, N, K);
      else for (int64_t i = n; i < N; i++) block<1, M>(x, w + i * K, y + i, N, K);
  });
}

template <typename T>
static void product(const float* x, const T* w, T* y, int64_t M, int64_t N, int64_t K) {
  for (; M > 8; M -= 8, x += 8 * K, y += 8 * N) rows<8>(x, w, y, N, K);
  switch (M) {
    case 1: return rows<1>(x, w, y, N, K);
    case 2: return rows<2>(x, w, y, N, K);
    case 3: return rows<3>(x, w, y, N, K);
    case 4: return rows<4>(x, w, y, N, K);
    case 5: return rows<5>(x, w, y, N, K);
    case 6: return rows<6>(x, w, y, N, K);
    case 7: return rows<7>(x, w, y, N, K);
    case 8: return rows<8>(x, w, y, N, K);
  }
}

// x (..., K), w (N, K) -> (..., N); float32 or bfloat16 throughout, accumulated in float32.
at::Tensor linear(const at::Tensor& x_, const at::Tensor& w) {
  at::Tensor x = x_.contiguous();
  TORCH_CHECK(w.is_contiguous() && w.dim() == 2 && x.size(-1) == w.size(1) && x.scalar_type() == w.scalar_type());
  int64_t K = w.size(1), N = w.size(0), M = x.numel() / K;
  auto shape = x.sizes().vec();
  shape.back() = N;
  at::Tensor y = at::empty(shape, x.options());
  if (w.scalar_type() == at::kFloat) {
    product(x.const_data_ptr<float>(), w.const_data_ptr<float>(), y.mutable_data_ptr<float>(), M, N, K);
  } else {
    TORCH_CHECK(w.scalar_type() == at::kBFloat16);
    std::vector<float> wide(M * K);
    const auto* p = x.const_data_ptr<at::BFloat16>();
    for (int64_t i = 0; i < M * K; i++) wide[i] = p[i];
    product(wide.data(), w.const_data_ptr<at::BFloat16>(), y.mutable_data_ptr<at::BFloat16>(), M, N, K);
  }
  return y;
}

// exp(x) for x <= 0 to about 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients).
static inline vec exponential(vec x) {
  x = x < -87.0f ? vec{} - 87.0f : x;
  vec n = __builtin_convertvector(__builtin_convertvector(x * 1.44269504f - 0.5f, ivec), vec);  // rounds half away, x <= 0
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

// One query over cache rows 0..last: y (C) = softmax(q k^T / sqrt(C)) v. score has room for last + W floats.
template <typename T>
static void attend_one(const T* q, const T* k, const T* v, T* y, int64_t last, int64_t C, float* score) {
  int64_t n = last + 1, padded = (n + W - 1) / W * W;
  float wide[512], out[512] = {};
  for (int64_t c = 0; c < C; c++) wide[c] = (float)q[c] / std::sqrt((float)C);
  float top = -INFINITY;
  for (int64_t s = 0; s < n; s++) {
    vec acc = {};
    int64_t c = 0;
    for (; c + W <= C; c += W) acc += load(k + s * C + c) * load(wide + c);
    float dot = sum(acc);
    for (; c < C; c++) dot = std::fma((float)k[s * C + c], wide[c], dot);
    score[s] = dot;
    top = std::max(top, dot);
  }
  for (int64_t s = n; s < padded; s++) score[s] = -INFINITY;
  vec total = {};
  for (int64_t s = 0; s < padded; s += W) {
    vec e = exponential(load(score + s) - top);
    *(vec*)(score + s) = e;
    if (s + W <= n) total += e;
  }
  float norm = sum(total);
  for (int64_t s = n / W * W; s < n; s++) norm += score[s];
  for (int64_t s = 0; s < n; s++) {
    int64_t c = 0;
    for (; c + W <= C; c += W) *(vec*)(out + c) += load(v + s * C + c) * score[s];
    for (; c < C; c++) out[c] = std::fma((float)v[s * C + c], score[s], out[c]);
  }
  for (int64_t c = 0; c < C; c++) y[c] = (T)(out[c] / norm);
}

// q (B, T, H, C), caches (B, G, S, C), pos (T) -> (B, T, H, C). Row t attends to cache rows 0..pos[t].
at::Tensor attend(const at::Tensor& q_, const at::Tensor& k, const at::Tensor& v, const at::Tensor& pos_) {
  at::Tensor q = q_.contiguous(), pos = pos_.contiguous();
  int64_t B = q.size(0), T = q.size(1), H = q.size(2), C = q.size(3), G = k.size(1), S = k.size(2);
  TORCH_CHECK(k.is_contiguous() && v.is_contiguous() && C <= 512 && q.scalar_type() == k.scalar_type());
  at::Tensor y = at::empty_like(q);
  const int64_t* p = pos.const_data_ptr<int64_t>();
  auto run = [&](auto type) {
    using D = decltype(type);
    const D *Q = q.const_data_ptr<D>(), *Kc = k.const_data_ptr<D>(), *Vc = v.const_data_ptr<D>();
    D* Y = y.mutable_data_ptr<D>();
    // Tasks in the order (b, h, t), so that a thread's queries share keys and values; small work stays on one thread.
    at::parallel_for(0, B * H * T, 1 + 32768 / ((p[T - 1] + 1) * C), [&](int64_t begin, int64_t end) {
      std::vector<float> score(S + W);
      for (int64_t i = begin; i < end; i++) {
        int64_t t = i % T, h = i / T % H, b = i / T / H;
        int64_t query = ((b * T + t) * H + h) * C, cache = (b * G + h / (H / G)) * S * C;
        attend_one(Q + query, Kc + cache, Vc + cache, Y + query, p[t], C, score.data());
      }
    });
  };
  if (q.scalar_type() == at::kFloat) run(float());
  else run(at::BFloat16());
  return y;
}

// x (..., D), w (D) -> (..., D): x / sqrt(mean(x^2) + eps) * w.
at::Tensor norm(const at::Tensor& x_, const at::Tensor& w, double eps) {
  at::Tensor x = x_.contiguous(), y = at::empty_like(x);
  TORCH_CHECK(w.is_contiguous() && x.size(-1) == w.size(0) && x.scalar_type() == w.scalar_type());
  int64_t D = w.size(0), M = x.numel() / D;
  auto run = [&](auto type) {
    using T = decltype(type);
    const T* W_ = w.const_data_ptr<T>();
    for (int64_t m = 0; m < M; m++) {
      const T* X = x.const_data_ptr<T>() + m * D;
      T* Y = y.mutable_data_ptr<T>() + m * D;
      vec squares = {};
      int64_t i = 0;
      for (; i + W <= D; i += W) squares += load(X + i) * load(X + i);
      float s = sum(squares);
      for (; i < D; i++) s = std::fma((float)X[i], (float)X[i], s);
      float scale = 1 / std::sqrt(s / D + (float)eps);
      for (i = 0; i < D; i++) Y[i] = (T)((float)(T)((float)X[i] * scale) * (float)W_[i]);
    }
  };
  if (x.scalar_type() == at::kFloat) run(float());
  else run(at::BFloat16());
  return y;
}

// x (..., 2F), gate and up beside each other -> silu(gate) * up (..., F).
at::Tensor swiglu(const at::Tensor& x_) {
  at::Tensor x = x_.contiguous();
  auto shape = x.sizes().vec();
  int64_t F = shape.back() / 2, M = x.numel() / (2 * F), B = 1024, blocks = (F + B - 1) / B;
  shape.back() = F;
  at::Tensor y = at::empty(shape, x.options());
  auto run = [&](auto type) {
    using T = decltype(type);
    const T* X = x.const_data_ptr<T>();
    T* Y = y.mutable_data_ptr<T>();
    at::parallel_for(0, M * blocks, 16, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) {
        int64_t m = b / blocks, stop = std::min(F, (b % blocks + 1) * B);
        for (int64_t i = b % blocks * B; i < stop; i += W) {
          int64_t n = std::min<int64_t>(W, stop - i);
          float gate[W] = {}, up[W] = {};  // the last few go through the same vector operations
          for (int64_t j = 0; j < n; j++) gate[j] = X[2 * m * F + i + j], up[j] = X[(2 * m + 1) * F + i + j];
          vec g = load(gate), e = exponential(g < 0.0f ? g : -g);
          vec out = g * (g < 0.0f ? e : vec{} + 1.0f) / (1.0f + e) * load(up);
          for (int64_t j = 0; j < n; j++) Y[m * F + i + j] = (T)out[j];
        }
      }
    });
  };
  if (x.scalar_type() == at::kFloat) run(float());
  else run(at::BFloat16());
  return y;
}

TORCH_LIBRARY(layerskip, m) {
  m.def("linear(Tensor x, Tensor w) -> Tensor");
  m.def("attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor pos) -> Tensor");
  m.def("norm(Tensor x, Tensor w, float eps) -> Tensor");
  m.def("swiglu(Tensor x) -> Tensor");
}
TORCH_LIBRARY_IMPL(layerskip, CPU, m) {
  m.impl("linear", linear);
  m.impl("attend", attend);
  m.impl("norm", norm);
  m.impl("swiglu", swiglu);
}
"""


def build():
    """Compile SOURCE for this processor and this PyTorch, once; returns the path of the shared library."""
    torch_dir = Path(torch.__file__).parent
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "")
    if not compiler:
        raise OSError("no C++ compiler found")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    flags = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    if platform.machine() == "x86_64" and b"clang" not in version:
        flags.append("--param=avoid-fma-max-bits=0")  # GCC breaks up some chains of FMA on AMD: rows would round differently
    cpuinfo = Path("/proc/cpuinfo")
    native = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "") if cpuinfo.is_file() else ""
    key = hashlib.sha256(repr((SOURCE, compiler, flags, version, torch.__version__, platform.platform(), native)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerskip-fast"
    library = folder / f"kernels-{key}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source, built = Path(work) / "kernels.cpp", Path(work) / "kernels.so"
            source.write_text(SOURCE)
            include = torch_dir / "include"
            subprocess.run([*compiler, *flags, f"-I{include}", f"-I{include}/torch/csrc/api/include", str(source), "-o", str(built),
                            f"-L{torch_dir}/lib", "-ltorch_cpu", "-lc10"], check=True, capture_output=True, text=True)
            built.replace(library)  # whole or not at all, also when two processes build at once
    return library


_ready = None  # whether the CPU library is loaded; None: not tried yet


def prepare():
    """Build and load the CPU library, once; returns whether it is there. Says why if it isn't."""
    global _ready
    if _ready is None:
        try:
            torch.ops.load_library(build())
            torch.library.register_fake("layerskip::linear", lambda x, w: x.new_empty(*x.shape[:-1], w.shape[0]))
            torch.library.register_fake("layerskip::attend", lambda q, k_cache, v_cache, pos: torch.empty_like(q))
            torch.library.register_fake("layerskip::norm", lambda x, w, eps: torch.empty_like(x))
            torch.library.register_fake("layerskip::swiglu", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
            _ready = True
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            reason = next((line for line in lines if "error" in line), lines[0])
            warnings.warn(f"decoding runs on plain PyTorch, which is slower: the C++ kernels can't be built ({reason})")
            _ready = False
    return _ready


def fits(x, rows):
    """Whether the CPU library is there and takes `rows` rows of x's kind."""
    return _ready and rows <= MAX_ROWS and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and not torch.is_grad_enabled()


def linear(x, w):
    """x (..., T, K) times w (N, K) transposed: (..., T, N)."""
    if fits(x, x.numel() // x.shape[-1]):
        return torch.ops.layerskip.linear(x, w)
    return F.linear(x, w)


def attend(q, k_cache, v_cache, pos):
    """Attention of q (B, T, H, C) at positions pos (T,) over cache rows 0..pos of k_cache and v_cache (B, G, S, C): (B, T, H, C)."""
    if fits(q, q.shape[1]):
        return torch.ops.layerskip.attend(q, k_cache, v_cache, pos)
    mask = torch.arange(k_cache.shape[2], device=pos.device) <= pos[:, None]  # (T, S)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k_cache, v_cache, attn_mask=mask, enable_gqa=q.shape[2] > k_cache.shape[1])
    return y.transpose(1, 2)


def norm(x, w, eps):
    """Root-mean-square norm (1910.07467) of x (..., D), computed in float32 whatever the dtype, times w (D,)."""
    if fits(x, x.numel() // x.shape[-1]):
        return torch.ops.layerskip.norm(x, w, eps)
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * w


def swiglu(x):
    """silu(gate) * up (2002.05202) for x (..., 2F), which holds gate and up: (..., F)."""
    if fits(x, x.numel() // x.shape[-1]):
        return torch.ops.layerskip.swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
