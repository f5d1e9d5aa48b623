"""The operations that decoding consists of, for few rows at a time: a product that streams each weight once, attention over
the valid part of the cache, the norm and the gate.

On the CPU they are a small C++ library, built with g++ at first use and cached; on CUDA, Triton kernels. Every output row is
computed by the same sequence of operations however many rows go with it, so drafting, verifying and plain decoding agree bit
for bit. Elsewhere, and where the library can't be built, plain PyTorch does the same work, slower and without that promise.
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

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with PyTorch's builds for CUDA
    triton = None

MAX_ROWS = 16  # beyond, in a prompt's pass, PyTorch's matrix product is the faster one

SOURCE = r"""
#include <torch/library.h>
#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <cmath>
#include <optional>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float vec __attribute__((vector_size(W * 4), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef uint16_t half_vec __attribute__((vector_size(W * 2), aligned(2)));
typedef int8_t byte_vec __attribute__((vector_size(W), aligned(1)));

static inline vec load(const float* p) { return *(const vec*)p; }
#if defined(__AVX512F__)  // GCC widens short vectors element by element unless told how
static inline ivec widen(half_vec v) { return (ivec)_mm512_cvtepu16_epi32((__m256i)v); }
static inline ivec widen(byte_vec v) { return (ivec)_mm512_cvtepi8_epi32((__m128i)v); }
#elif defined(__AVX2__)
static inline ivec widen(half_vec v) { return (ivec)_mm256_cvtepu16_epi32((__m128i)v); }
static inline ivec widen(byte_vec v) { return (ivec)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)v)); }
#else
template <typename V> static inline ivec widen(V v) { return __builtin_convertvector(v, ivec); }
#endif
static inline vec load(const c10::BFloat16* p) { return (vec)(widen(*(const half_vec*)p) << 16); }  // the upper half of a float
static inline vec load(const int8_t* p) { return __builtin_convertvector(widen(*(const byte_vec*)p), vec); }
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

// y[m, n] = scale[n] * sum over k of x[m, k] w[n, k], for R weight rows and M input rows at a time. Each (m, n) has one
// accumulator and one order of additions, whatever R and M are.
template <int R, int M, typename T, typename Y>
static void block(const float* x, const T* w, const float* scale, Y* y, int64_t N, int64_t K) {
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
      y[m * N + r] = (Y)(scale ? s * scale[r] : s);
    }
}

template <int M, typename T, typename Y>
static void rows(const float* x, const T* w, const float* scale, Y* y, int64_t N, int64_t K) {
#ifdef __AVX512F__  // measured on Zen 5
  constexpr int R = M <= 3 ? 8 : M == 4 ? 6 : M == 5 ? 5 : 3;
#else  // measured on Zen 3, where weight rows side by side hinder the prefetching
  constexpr int R = M == 1 && sizeof(T) > 1 ? 8 : 1;
#endif
  at::parallel_for(0, (N + R - 1) / R, 1 + 32768 / (K * R), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * R; n < std::min(end * R, N); n += R)
      if (n + R <= N) block<R, M>(x, w + n * K, scale ? scale + n : nullptr, y + n, N, K);
      else for (int64_t i = n; i < N; i++) block<1, M>(x, w + i * K, scale ? scale + i : nullptr, y + i, N, K);
  });
}

template <typename T, typename Y>
static void product(const float* x, const T* w, const float* scale, Y* y, int64_t M, int64_t N, int64_t K) {
  for (; M > 8; M -= 8, x += 8 * K, y += 8 * N) rows<8>(x, w, scale, y, N, K);
  switch (M) {
    case 1: return rows<1>(x, w, scale, y, N, K);
    case 2: return rows<2>(x, w, scale, y, N, K);
    case 3: return rows<3>(x, w, scale, y, N, K);
    case 4: return rows<4>(x, w, scale, y, N, K);
    case 5: return rows<5>(x, w, scale, y, N, K);
    case 6: return rows<6>(x, w, scale, y, N, K);
    case 7: return rows<7>(x, w, scale, y, N, K);
    case 8: return rows<8>(x, w, scale, y, N, K);
  }
}

// x (..., K) float32 or bfloat16, w (N, K) of the same type, or int8 with scale (N) float32 -> (..., N) as x; accumulated in float32.
at::Tensor linear(const at::Tensor& x_, const at::Tensor& w, const std::optional<at::Tensor>& scale) {
  at::Tensor x = x_.contiguous();
  int64_t K = w.size(1), N = w.size(0), M = x.numel() / K;
  TORCH_CHECK(w.is_contiguous() && w.dim() == 2 && x.size(-1) == K && w.scalar_type() == (scale ? at::kChar : x.scalar_type()));
  TORCH_CHECK(!scale || (scale->is_contiguous() && scale->numel() == N && scale->scalar_type() == at::kFloat));
  auto shape = x.sizes().vec();
  shape.back() = N;
  at::Tensor y = at::empty(shape, x.options());
  auto run = [&](const float* input, auto* out) {
    using Y = std::remove_pointer_t<decltype(out)>;
    if (scale) product(input, w.const_data_ptr<int8_t>(), scale->const_data_ptr<float>(), out, M, N, K);
    else product(input, w.const_data_ptr<Y>(), (const float*)nullptr, out, M, N, K);
  };
  if (x.scalar_type() == at::kFloat) {
    run(x.const_data_ptr<float>(), y.mutable_data_ptr<float>());
  } else {
    std::vector<float> wide(M * K);
    const auto* p = x.const_data_ptr<at::BFloat16>();
    for (int64_t i = 0; i < M * K; i++) wide[i] = p[i];
    run(wide.data(), y.mutable_data_ptr<at::BFloat16>());
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
  m.def("linear(Tensor x, Tensor w, Tensor? scale=None) -> Tensor");
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


enabled = True  # False: plain PyTorch everywhere, to compare with
_ready = None  # whether the CPU library is loaded; None: not tried yet


def prepare():
    """Build and load the CPU library, once; returns whether it is there. Says why if it isn't."""
    global _ready
    if _ready is None:
        try:
            torch.ops.load_library(build())
            torch.library.register_fake("layerskip::linear", lambda x, w, scale=None: x.new_empty(*x.shape[:-1], w.shape[0]))
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


def backend(x, rows):
    """The kernels that take `rows` rows of x's kind: "cpu" (the library above), "cuda" (the Triton kernels below), or None."""
    if not enabled or rows > MAX_ROWS or torch.is_grad_enabled():
        return None
    if _ready and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        return "cpu"
    return "cuda" if triton and x.device.type == "cuda" else None


# On CUDA: Triton kernels for the products, attention and the norm; the compiler fuses what lies between. Here too a row's
# arithmetic is the same whatever goes with it: rows are padded to one size, splits of the cache are cut at fixed places.

def gpu_linear(x, w, scale=None):
    """`linear` as one kernel that streams w once. x (..., K) with at most MAX_ROWS rows."""
    N, K = w.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], N)
    block_n, block_k = 16 if N <= 8192 else 32, 512 // w.itemsize  # 8 or 16 KB of weights in each step
    linear_kernel[triton.cdiv(N, block_n),](x, w, scale, y, x.numel() // K, N, K, MAX_ROWS, block_n, block_k, num_warps=4, num_stages=4)
    return y


def gpu_attend(q, k_cache, v_cache, pos):
    """`attend` in two kernels: parts of SPLIT cache rows each, of which those beyond the positions end at once, then their sum."""
    B, T, H, C = q.shape
    G, S = k_cache.shape[1:3]
    rows, splits, block_c = triton.next_power_of_2(MAX_ROWS * (H // G)), triton.cdiv(S, SPLIT), max(16, triton.next_power_of_2(C))
    part = torch.empty(B, G, splits, rows, C, dtype=torch.float32, device=q.device)
    stat = torch.empty(B, G, splits, rows, 2, dtype=torch.float32, device=q.device)  # largest score, sum of exponentials
    y, q = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.contiguous()
    warps = 4 if rows <= 64 else 8
    attend_kernel[splits, G, B](q, k_cache, v_cache, pos, part, stat, T, S, C, H // G, SPLIT, 32, rows, block_c, num_warps=warps, num_stages=2)
    combine_kernel[T, H, B](part, stat, pos, y, splits, C, H // G, SPLIT, rows, block_c, num_warps=1)
    return y


def gpu_norm(x, w, eps):
    """`norm`, one program to a row."""
    x = x.contiguous()
    y, D = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    norm_kernel[x.numel() // D,](x, w, y, D, eps, triton.next_power_of_2(D), num_warps=8)
    return y


SPLIT = 256  # cache rows that one program attends to

if triton:
    @triton.jit
    def linear_kernel(x, w, scale, y, M, N, K, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
        m, n = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)  # (ROWS, BLOCK_K)
            b = tl.load(w + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0)  # (BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
        if scale is not None:
            acc *= tl.load(scale + n, mask=n < N, other=0)[None, :]
        tl.store(y + m[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])

    @triton.jit
    def attend_kernel(q, k, v, pos, part, stat, T, S, C, GROUP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr,
                      ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
        split, g, b, G = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
        last = tl.load(pos + T - 1)
        if split * SPLIT > last:
            return
        row, c = tl.arange(0, ROWS), tl.arange(0, BLOCK_C)  # row: the group's heads of every query
        t, head = row // GROUP, g * GROUP + row % GROUP
        limit = tl.load(pos + t, mask=t < T, other=-1)  # a query sees cache rows up to its own position
        query = tl.load(q + ((b * T + t) * (G * GROUP) + head)[:, None] * C + c[None, :], mask=(t < T)[:, None] & (c < C)[None, :], other=0)
        factor = 1.4426950408889634 / tl.sqrt(C.to(tl.float32))  # to powers of 2
        top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
        cache = (b * G + g).to(tl.int64) * S * C
        for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, last + 1), BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            keys = tl.load(k + cache + s[None, :] * C + c[:, None], mask=(s <= last)[None, :] & (c < C)[:, None], other=0)  # (C, S)
            score = tl.dot(query, keys, input_precision="ieee") * factor
            score = tl.where(s[None, :] <= limit[:, None], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that see nothing yet
            weight = tl.exp2(score - shift[:, None])
            keep = tl.exp2(top - shift)
            values = tl.load(v + cache + s[:, None] * C + c[None, :], mask=(s <= last)[:, None] & (c < C)[None, :], other=0)  # (S, C)
            total = total * keep + tl.sum(weight, 1)
            acc = tl.dot(weight.to(values.dtype), values, acc * keep[:, None], input_precision="ieee")
            top = new_top
        out = ((b * G + g) * tl.num_programs(0) + split) * ROWS + row
        tl.store(part + out[:, None] * C + c[None, :], acc, mask=(t < T)[:, None] & (c < C)[None, :])
        tl.store(stat + out * 2, top, mask=t < T)
        tl.store(stat + out * 2 + 1, total, mask=t < T)

    @triton.jit
    def combine_kernel(part, stat, pos, y, splits, C, GROUP: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
        t, head, b, T, H = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0), tl.num_programs(1)
        row, c = t * GROUP + head % GROUP, tl.arange(0, BLOCK_C)
        first = (b * (H // GROUP) + head // GROUP) * splits
        top, total, acc = -float("inf"), 0.0, tl.zeros((BLOCK_C,), tl.float32)
        for split in range(0, tl.load(pos + t) // SPLIT + 1):
            out = (first + split) * ROWS + row
            part_top, part_total = tl.load(stat + out * 2), tl.load(stat + out * 2 + 1)
            new_top = tl.maximum(top, part_top)
            keep, add = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
            acc = acc * keep + tl.load(part + out * C + c, mask=c < C, other=0) * add
            total = total * keep + part_total * add
            top = new_top
        tl.store(y + ((b * T + t) * H + head) * C + c, (acc / total).to(y.dtype.element_ty), mask=c < C)

    @triton.jit
    def norm_kernel(x, w, y, D, eps, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        row = tl.program_id(0) * D
        v = tl.load(x + row + i, mask=i < D, other=0).to(tl.float32)
        v = v * tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        v = v.to(y.dtype.element_ty).to(tl.float32) * tl.load(w + i, mask=i < D, other=0).to(tl.float32)
        tl.store(y + row + i, v.to(y.dtype.element_ty), mask=i < D)


# The operations themselves.

def linear(x, w, scale=None):
    """x (..., T, K) times w (N, K) transposed: (..., T, N). w of x's dtype, or int8 with a float32 scale (N,) for its rows."""
    kind = backend(x, x.numel() // x.shape[-1])
    if kind == "cpu":
        return torch.ops.layerskip.linear(x, w, scale)
    if kind == "cuda":
        return gpu_linear(x, w, scale)
    if scale is None:
        return F.linear(x, w)
    return (F.linear(x, w.to(x.dtype)) * scale).to(x.dtype)


def int8_rows(w):
    """w (N, K) as int8 (N, K) and float32 scales (N,), symmetric, so that the largest of a row is 127 scales."""
    scale = torch.cat([part.abs().amax(1) for part in w.split(8192)]).float().clamp(min=1e-12) / 127  # in parts: little memory beside w
    return torch.cat([(part.float() / s[:, None]).round().to(torch.int8) for part, s in zip(w.split(8192), scale.split(8192))]), scale


def attend(q, k_cache, v_cache, pos):
    """Attention of q (B, T, H, C) at positions pos (T,) over cache rows 0..pos of k_cache and v_cache (B, G, S, C): (B, T, H, C)."""
    kind = backend(q, q.shape[1])
    if kind == "cpu":
        return torch.ops.layerskip.attend(q, k_cache, v_cache, pos)
    if kind == "cuda":
        return gpu_attend(q, k_cache, v_cache, pos)
    mask = torch.arange(k_cache.shape[2], device=pos.device) <= pos[:, None]  # (T, S)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k_cache, v_cache, attn_mask=mask, enable_gqa=q.shape[2] > k_cache.shape[1])
    return y.transpose(1, 2)


def norm(x, w, eps):
    """Root-mean-square norm (1910.07467) of x (..., D), computed in float32 whatever the dtype, times w (D,)."""
    kind = backend(x, x.numel() // x.shape[-1])
    if kind == "cpu":
        return torch.ops.layerskip.norm(x, w, eps)
    if kind == "cuda":
        return gpu_norm(x, w, eps)
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * w


def swiglu(x):
    """silu(gate) * up (2002.05202) for x (..., 2F), which holds gate and up: (..., F)."""
    if backend(x, x.numel() // x.shape[-1]) == "cpu":
        return torch.ops.layerskip.swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
