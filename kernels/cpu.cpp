// The CPU's kernels, which cpu.py builds: a model's layers and the products with few rows, on all cores at once.
//
// Letters as in model.py: M rows (tokens) in this call, D model width, H query heads, G key/value heads, C head width,
// F feed-forward width, S cache rows. Every row is computed by the same sequence of operations, whatever M is and
// however many threads share the work.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
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
template <typename V>
static inline ivec widen(V v) {
  return __builtin_convertvector(v, ivec);
}
#endif
// Keep v in a register. The compiler would load it again for each use, and loads are what limits a product of few rows.
static inline void keep(vec& v) {
#ifdef __AVX__
  asm("" : "+v"(v));
#endif
}

// A bfloat16 is the upper half of a float.
static inline vec load(const c10::BFloat16* p) { return (vec)(widen(*(const half_vec*)p) << 16); }
static inline vec load(const int8_t* p) { return __builtin_convertvector(widen(*(const byte_vec*)p), vec); }

// Halves are added until one number is left: a few short steps. Adding the elements in turn would take W steps.
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

// Half of the lanes of x and of y: `Upper` of them or lower ones of each 2 H lanes. Those of x and y alternate, H by H.
template <int H, bool Upper>
[[gnu::always_inline]] static inline vec halves(vec x, vec y) {
  constexpr auto from = [](int i) { return (i / H % 2) * W + i / (2 * H) * 2 * H + i % H + (Upper ? H : 0); };
#ifdef __clang__
  auto shuffle = [&]<int... I>(std::integer_sequence<int, I...>) { return __builtin_shufflevector(x, y, from(I)...); };
  return shuffle(std::make_integer_sequence<int, W>());
#else
  ivec lanes;
  for (int i = 0; i < W; i++) lanes[i] = from(i);
  return __builtin_shuffle(x, y, lanes);
#endif
}

template <int H>
[[gnu::always_inline]] static inline void add_halves(vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < H; i++) v[i] = halves<H, false>(v[i], v[i + H]) + halves<H, true>(v[i], v[i + H]);
}

// Lane i of the result is `sum` of v[i], of W vectors, by the same additions.
[[gnu::always_inline]] static inline vec sums(vec* v) {
  if constexpr (W == 16) add_halves<8>(v);
  add_halves<4>(v);
  add_halves<2>(v);
  add_halves<1>(v);
  return v[0];
}

// exp(x) for x <= 0 to about 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients).
static inline vec exponential(vec x) {
  x = x < -87.0f ? vec{} - 87.0f : x;
  // Truncated after 0.5 is subtracted: the nearest whole number, since x <= 0.
  vec n = __builtin_convertvector(__builtin_convertvector(x * 1.44269504f - 0.5f, ivec), vec);
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

// How many threads a team has: as many as PyTorch has, less those that other programs keep from running. All others wait
// for a thread that has lost its core, for a time slice of some milliseconds in a step of microseconds; then fewer
// threads are faster. So when that happens again and again the team does without one thread, for a while.
struct TeamSize {
  using Clock = std::chrono::steady_clock;
  static constexpr auto LONG = std::chrono::microseconds(700);   // no step of a healthy team lets a thread wait so long
  static constexpr int OFTEN = 3;                                // so many long waits ...
  static constexpr auto WINDOW = std::chrono::milliseconds(50);  // ... within this time
  static constexpr Clock::duration FIRST = std::chrono::milliseconds(20), LAST = std::chrono::seconds(2);

  int threads() {
    const int now = at::get_num_threads();
    if (now != all - left_out) all = now, left_out = 0, pause = FIRST;  // the program has chosen another number
    const auto since = Clock::now() - changed;
    if (left_out && since > pause) set(left_out - 1);
    else if (!left_out && since > 4 * pause) pause = FIRST;  // all is well again
    return all - left_out;
  }

  void waited_long() {
    const auto now = Clock::now();
    if (now - first_wait > WINDOW) first_wait = now, waits = 0;
    if (++waits < OFTEN || left_out == all - 1) return;
    waits = 0;
    set(left_out + 1);
    pause = std::min(2 * pause, LAST);  // longer each time that it happens again
  }

 private:
  // PyTorch's own operations get the same number: they would wait in the same way.
  void set(int count) {
    left_out = count;
    changed = Clock::now();
    at::set_num_threads(all - left_out);
  }

  int all = 0, left_out = 0, waits = 0;
  Clock::duration pause = FIRST;
  Clock::time_point changed, first_wait;
};
static thread_local TeamSize team_size;

// One of a team of threads, which run the same function: each takes its share of every step, and all meet before the
// next.
struct Member {
  int64_t index, count;
  std::atomic<bool>* slow;  // whether one has waited too long for another

  // This member's share [begin, end) of n items, in whole cache lines of floats.
  std::pair<int64_t, int64_t> share(int64_t n) const {
    int64_t lines = (n + 15) / 16;
    return {std::min(n, lines * index / count * 16), std::min(n, lines * (index + 1) / count * 16)};
  }

  // wait: whether what the others do takes long for a good reason.
  void meet(bool wait = false) const {
    if (count == 1) return;
    const auto began = TeamSize::Clock::now();
#ifdef _OPENMP
#pragma omp barrier
#endif
    if (!wait && TeamSize::Clock::now() - began > TeamSize::LONG) *slow = true;
  }
};

template <typename F>
static void team(F work) {
#ifdef _OPENMP
  std::atomic<bool> slow = false;
#pragma omp parallel num_threads(team_size.threads())
  {
    Member me{omp_get_thread_num(), omp_get_num_threads(), &slow};
    work(me);
    me.meet();
  }
  if (slow) team_size.waited_long();
#else
  work(Member{0, 1, nullptr});
#endif
}

constexpr int REGISTERS = W == 16 ? 32 : 16;
constexpr int MOST = W == 16 ? 8 : 6;  // rows of x that the registers have room for, beside two vectors of weights
constexpr int PANEL = 16;              // outputs of a quantized weight that lie side by side

// A weight (N, K): float32 or bfloat16, row after row; or int8 or int4 in panels of 16 outputs, see formats.py. int8 has
// a float32 scale for each output, int4 a bfloat16 scale and zero for each group of G columns of an output.
struct Matrix {
  const void *data, *scale = nullptr, *zero = nullptr;
  at::ScalarType type;
  int64_t N, K, G = 0;  // in panels, N is rounded up to whole ones

  Matrix(const at::Tensor& w, const std::optional<at::Tensor>& s, const std::optional<at::Tensor>& z)
      : data(w.const_data_ptr()), type(w.scalar_type()), N(w.size(0)), K(w.size(1)) {
    at::ScalarType wanted = type == at::kBFloat16 ? type : at::kFloat;
    if (z) wanted = at::kInt;
    else if (s) wanted = at::kChar;
    TORCH_CHECK(w.dim() == (s ? 3 : 2) && w.is_contiguous() && type == wanted);
    if (!s) return;
    const int64_t panels = N, groups = s->size(1);
    N *= PANEL;
    scale = s->const_data_ptr();
    TORCH_CHECK(w.size(2) == PANEL && s->is_contiguous() && s->sizes() == at::IntArrayRef({panels, groups, PANEL}) &&
                s->scalar_type() == (z ? at::kBFloat16 : at::kFloat));
    if (!z) return;
    K *= 8;
    G = K / groups;
    zero = z->const_data_ptr();
    TORCH_CHECK(z->is_contiguous() && z->sizes() == s->sizes() && z->scalar_type() == at::kBFloat16);
    TORCH_CHECK(G % 8 == 0 && G * groups == K);
  }

  // Only the first n outputs: the others of the last panel are there to fill it.
  Matrix first(int64_t n) const {
    TORCH_CHECK(n == N || (scale && n < N && n > N - PANEL));
    Matrix part = *this;
    part.N = n;
    return part;
  }
};

// Ask for the weights that come soon. Rows of weights that are taken one by one go to the nearest cache, 2 KB ahead;
// tiles, with which there is more to compute meanwhile, to the second cache, `ahead` bytes ahead.
template <bool Single>
static inline void prefetch(const void* p, int64_t ahead) {
  if (Single) __builtin_prefetch((const char*)p + 2048);
  else __builtin_prefetch((const char*)p + ahead, 0, 2);
}

// Columns [n, n + R) of y[m, n] = sum over k of x[m, k] w[n, k]. Each (m, n) has one accumulator and one order of
// additions, whatever M and R are.
template <int M, int R, typename T>
[[gnu::always_inline]] static inline void tile(const float* x, const Matrix& w, float* y, int64_t n, int64_t ahead) {
  const int64_t N = w.N, K = w.K;
  const T* rows = (const T*)w.data + n * K;
  vec acc[R][M] = {};
  int64_t k = 0;
  for (; k + W <= K; k += W) {
    vec v[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      prefetch<R * M == 1>(rows + r * K + k, ahead);
      v[r] = load(rows + r * K + k);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      vec own = load(x + m * K + k);
      keep(own);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[r][m] += v[r] * own;
    }
  }
  float total[(R * M + W - 1) / W * W];
  if constexpr (R * M == 1) {
    total[0] = sum(acc[0][0]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < R * M; i += W) {
      vec some[W] = {};
#pragma GCC unroll 16
      for (int j = 0; j < std::min(W, R * M - i); j++) some[j] = acc[(i + j) / M][(i + j) % M];
      *(vec*)(total + i) = sums(some);
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float s = total[r * M + m];
      for (int64_t j = k; j < K; j++) s = std::fma((float)rows[r * K + j], x[m * K + j], s);
      y[m * N + n + r] = s;
    }
}

constexpr int64_t SHORT = 1024;  // columns, below which rows of weights are read fastest one by one; measured on Zen 4

// As many rows of weights together as there are registers for, so that there is less to load for each multiplication.
// ahead: bytes, 0 for two tiles.
template <int M, typename T>
[[gnu::noinline]] static void tiles(const float* x, const Matrix& w, float* y, int64_t begin, int64_t end,
                                    int64_t ahead) {
  constexpr int R = std::min(8, (REGISTERS - 2) / (M + 1));
  if (!ahead) ahead = 2 * R * w.K * sizeof(T);
  int64_t n = begin;
  if (M > 1 || w.K >= SHORT)
    for (; n + R <= end; n += R) tile<M, R, T>(x, w, y, n, ahead);
  for (; n < end; n++) tile<M, 1, T>(x, w, y, n, ahead);
}

// Quantized weights of a panel from one column on. Its 16 outputs are V vectors.
constexpr int V = PANEL / W;

struct Int8Panel {
  static constexpr int STEP = 1;  // columns at one address
  static vec number(const int8_t* p, int) { return load(p); }
};

// A lane holds eight columns of one output, each a number of four bits with a sign, the first in the lowest ones.
struct Int4Panel {
  static constexpr int STEP = 8;
  static vec number(const int32_t* p, int i) {
    ivec lanes = *(const ivec*)p;
#ifdef __AVX512F__
    const __m512 numbers = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    return (vec)_mm512_permutexvar_ps((__m512i)(lanes >> 4 * i), numbers);  // looks at four bits only
#else
    return __builtin_convertvector(lanes << (28 - 4 * i) >> 28, vec);
#endif
  }
};

constexpr int64_t AHEAD = 256;  // bytes of a panel that are asked for before they are needed

// Adds to acc[p][v][m] the products of columns [begin, end) of P panels, `stride` apart, with M rows of x. Each output
// of each row has one accumulator and one order of additions, whatever M and P are.
template <int M, int P, typename Panel, typename T>
[[gnu::always_inline]] static inline void add_panels(const float* x, int64_t K, const T* data, int64_t stride,
                                                     int64_t begin, int64_t end, vec (*acc)[V][M]) {
  constexpr int64_t LINE = 64 / sizeof(T) / PANEL * Panel::STEP;  // columns in a cache line
  for (int64_t k = begin; k < end; k += Panel::STEP) {
    const T* first = data + k / Panel::STEP * PANEL;
    if (k % LINE == 0) {
      // Soon to be read: further on in these panels, or beyond their ends the beginning of the next ones.
      int64_t soon = k / Panel::STEP * PANEL + AHEAD / sizeof(T);
      if (soon >= stride) soon += (P - 1) * stride;
#pragma GCC unroll 16
      for (int p = 0; p < P; p++) __builtin_prefetch(data + p * stride + soon);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Panel::STEP; i++)
#pragma GCC unroll 16
      for (int p = 0; p < P; p++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
          vec w = Panel::number(first + p * stride + v * W, i);
#pragma GCC unroll 16
          for (int m = 0; m < M; m++) acc[p][v][m] += w * x[m * K + k + i];
        }
  }
}

// Those of a panel's outputs, from `first` on, that lie in [begin, end) go to y (N).
static inline void store(const vec* out, float* y, int64_t first, int64_t begin, int64_t end) {
  if (first >= begin && first + PANEL <= end) {
    for (int v = 0; v < V; v++) *(vec*)(y + first + v * W) = out[v];
  } else {
    for (int64_t n = std::max(first, begin); n < std::min(first + PANEL, end); n++)
      y[n] = out[(n - first) / W][(n - first) % W];
  }
}

// P panels from output n on, of which the outputs [begin, end) are wanted.
template <int M, int P>
[[gnu::noinline]] static void panels(const float* x, const float* sums, const Matrix& w, float* y, int64_t n,
                                     int64_t begin, int64_t end) {
  const int64_t N = w.N, K = w.K;
  vec out[P][V][M] = {};
  if (w.type == at::kChar) {
    add_panels<M, P, Int8Panel>(x, K, (const int8_t*)w.data + n * K, PANEL * K, 0, K, out);
  } else {
    const int64_t groups = K / w.G;
    for (int64_t g = 0; g < groups; g++) {
      vec acc[P][V][M] = {};
      add_panels<M, P, Int4Panel>(x, K, (const int32_t*)w.data + n * K / 8, PANEL * K / 8, g * w.G, (g + 1) * w.G, acc);
      for (int p = 0; p < P; p++) {
        const int64_t at = ((n / PANEL + p) * groups + g) * PANEL;
        for (int v = 0; v < V; v++) {
          vec scale = load((const c10::BFloat16*)w.scale + at + v * W);
          vec zero = load((const c10::BFloat16*)w.zero + at + v * W);
          for (int m = 0; m < M; m++) out[p][v][m] += acc[p][v][m] * scale + zero * sums[m * groups + g];
        }
      }
    }
  }
  for (int p = 0; p < P; p++) {
    const int64_t first = n + p * PANEL;
    for (int m = 0; m < M; m++) {
      vec row[V];
      for (int v = 0; v < V; v++) {
        row[v] = out[p][v][m];
        if (w.type == at::kChar) row[v] *= load((const float*)w.scale + first + v * W);
      }
      store(row, y + m * N, first, begin, end);
    }
  }
}

// Columns [begin, end) of y. Where they begin or end within a panel, all of it is computed. sums: of each group of each
// row of x, for int4.
template <int M>
static void quantized_rows(const float* x, const float* sums, const Matrix& w, float* y, int64_t begin, int64_t end) {
  constexpr int P = std::max(1, std::min(4, 2 * MOST / (V * M)));  // as many as there are registers for
  constexpr int HALF = std::max(1, P / 2);
  int64_t n = begin / PANEL * PANEL;
  for (; n + P * PANEL <= end; n += P * PANEL) panels<M, P>(x, sums, w, y, n, begin, end);
  for (; n + HALF * PANEL <= end; n += HALF * PANEL) panels<M, HALF>(x, sums, w, y, n, begin, end);
  for (; n < end; n += PANEL) panels<M, 1>(x, sums, w, y, n, begin, end);
}

// The sum of each group of G of x (M, K): (M, K / G)
static std::vector<float> group_sums(const float* x, int64_t M, int64_t K, int64_t G) {
  std::vector<float> sums(M * K / G);
  for (size_t i = 0; i < sums.size(); i++)
    for (int64_t k = 0; k < G; k++) sums[i] += x[i * G + k];
  return sums;
}

template <int M>
static void rows(const float* x, const float* sums, const Matrix& w, float* y, int64_t begin, int64_t end,
                 int64_t ahead) {
  switch (w.type) {
    case at::kFloat: return tiles<M, float>(x, w, y, begin, end, ahead);
    case at::kBFloat16: return tiles<M, c10::BFloat16>(x, w, y, begin, end, ahead);
    default: return quantized_rows<M>(x, sums, w, y, begin, end);
  }
}

// Columns [begin, end) of y (M, N) = x (M, K) times w (N, K) transposed.
static void product(const float* x, int64_t M, const Matrix& w, float* y, int64_t begin, int64_t end) {
  std::vector<float> sums;
  if (w.zero) sums = group_sums(x, M, w.K, w.G);
  // Rows that don't fit into the registers together take turns, while the weights of some columns are in the cache.
  const int64_t turns = (M + MOST - 1) / MOST, most = (M + turns - 1) / turns;
  const int64_t columns = turns > 1 ? 2 * PANEL : end - begin;
  const int64_t ahead = turns > 1 ? columns * w.K * (w.type == at::kFloat ? 4 : 2) : 0;  // the columns that follow
  for (int64_t first = begin; first < end; first += columns) {
    const int64_t last = std::min(end, first + columns);
    for (int64_t m = 0; m < M; m += most) {
      const float *own = x + m * w.K, *own_sums = w.zero ? &sums[m * w.K / w.G] : nullptr;
      float* out = y + m * w.N;
      switch (std::min(M - m, most)) {
        case 1: rows<1>(own, own_sums, w, out, first, last, ahead); break;
        case 2: rows<2>(own, own_sums, w, out, first, last, ahead); break;
        case 3: rows<3>(own, own_sums, w, out, first, last, ahead); break;
        case 4: rows<4>(own, own_sums, w, out, first, last, ahead); break;
        case 5: rows<5>(own, own_sums, w, out, first, last, ahead); break;
        case 6: rows<6>(own, own_sums, w, out, first, last, ahead); break;
        case 7: rows<std::min(7, MOST)>(own, own_sums, w, out, first, last, ahead); break;
        case 8: rows<std::min(8, MOST)>(own, own_sums, w, out, first, last, ahead); break;
      }
    }
  }
}

// y (D) = x / sqrt(mean(x^2) + eps) * w
template <typename T>
static void normalize(const float* x, const T* w, float* y, int64_t D, float eps) {
  vec squares = {};
  int64_t i = 0;
  for (; i + W <= D; i += W) squares += load(x + i) * load(x + i);
  float s = sum(squares);
  for (; i < D; i++) s = std::fma(x[i], x[i], s);
  float scale = 1 / std::sqrt(s / D + eps);
  for (i = 0; i < D; i++) y[i] = (float)(T)(x[i] * scale) * (float)w[i];
}

// y (n) = silu(gate) * up
static void gated(const float* gate, const float* up, float* y, int64_t n) {
  auto gate_vec = [](vec g, vec u) {
    vec e = exponential(g < 0.0f ? g : -g);
    return g * (g < 0.0f ? e : vec{} + 1.0f) / (1.0f + e) * u;
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) *(vec*)(y + i) = gate_vec(load(gate + i), load(up + i));
  if (i < n) {  // the last few go through the same vector operations
    float g[W] = {}, u[W] = {};
    for (int64_t j = i; j < n; j++) g[j - i] = gate[j], u[j - i] = up[j];
    vec out = gate_vec(load(g), load(u));
    for (int64_t j = i; j < n; j++) y[j] = out[j - i];
  }
}

// RoPE: component i of x (C) turns with i + C/2.
static void rotate(float* x, const float* cos, const float* sin, int64_t C) {
  for (int64_t i = 0; i < C / 2; i++) {
    float a = x[i], b = x[i + C / 2];
    x[i] = a * cos[i] - b * sin[i];
    x[i + C / 2] = b * cos[i] + a * sin[i];
  }
}

constexpr int TOGETHER = 4;  // queries that read keys and values together

// One query: q (C) over cache rows 0..last into y (C).
struct Query {
  const float* q;
  float* y;
  int64_t last;
};

// The scores q k^T of W keys (C each) and a query q (C), of which the first `seen` count: the others are -inf.
template <typename T>
[[gnu::always_inline]] static inline vec key_scores(const float* q, const T* const* key, int64_t seen, int64_t C) {
  vec dot[W] = {};
  int64_t c = 0;
  for (; c + W <= C; c += W) {
    const vec own = load(q + c);
#pragma GCC unroll 16
    for (int j = 0; j < W; j++) dot[j] += load(key[j] + c) * own;
  }
  vec score = sums(dot);
  for (; c < C; c++)
    for (int j = 0; j < W; j++) score[j] = std::fma((float)key[j][c], q[c], score[j]);
  ivec lane;
  for (int j = 0; j < W; j++) lane[j] = j;
  return lane < (int32_t)std::clamp<int64_t>(seen, 0, W) ? score : vec{} - INFINITY;
}

// Columns [c, c + N * W) of each query's sum over its cache rows of weight * value.
template <int Q, int N, typename T>
[[gnu::always_inline]] static inline void mix(const Query* query, const float* weight, int64_t room, const T* v,
                                              int64_t C, int64_t c, int64_t shared) {
  vec acc[Q][N] = {};
  auto add = [&](int q, int64_t s) {
    for (int i = 0; i < N; i++) acc[q][i] += load(v + s * C + c + i * W) * weight[q * room + s];
  };
  for (int64_t s = 0; s < shared; s++)
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++) add(q, s);
#pragma GCC unroll 4
  for (int q = 0; q < Q; q++) {
    for (int64_t s = shared; s <= query[q].last; s++) add(q, s);
    for (int i = 0; i < N; i++) *(vec*)(query[q].y + c + i * W) = acc[q][i];
  }
}

// Q queries over the same keys and values: y (C) = softmax(q k^T / sqrt(C)) v. Each query is computed by the same
// sequence of operations, whichever others go with it. score has room for Q times `room` floats, room a multiple of W.
template <int Q, typename T>
[[gnu::noinline]] static void attend(const Query* query, const T* k, const T* v, int64_t C, float* score,
                                     int64_t room) {
  float wide[Q][512], total[Q];
  int64_t most = query[0].last, shared = query[0].last + 1;  // the last row that any sees, the rows that all see
  for (int q = 0; q < Q; q++) {
    most = std::max(most, query[q].last);
    shared = std::min(shared, query[q].last + 1);
    for (int64_t c = 0; c < C; c++) wide[q][c] = query[q].q[c] / std::sqrt((float)C);
  }
  for (int64_t s = 0; s <= most; s += W) {
    const T* key[W];
    for (int j = 0; j < W; j++) key[j] = k + std::min(s + j, most) * C;
    for (int64_t i = 0; i < W * C; i += 64 / sizeof(T)) __builtin_prefetch(k + (s + 2 * W) * C + i);
    for (int q = 0; q < Q; q++) *(vec*)(score + q * room + s) = key_scores(wide[q], key, query[q].last + 1 - s, C);
  }
  for (int q = 0; q < Q; q++) {
    float *own = score + q * room, top = -INFINITY;
    vec tops = vec{} - INFINITY, all = {};
    for (int64_t s = 0; s <= most; s += W) tops = load(own + s) > tops ? load(own + s) : tops;
    for (int j = 0; j < W; j++) top = std::max(top, tops[j]);
    for (int64_t s = 0; s <= most; s += W) {
      vec score = load(own + s), e = exponential(score - top);
      e = score == -INFINITY ? vec{} : e;
      *(vec*)(own + s) = e;
      all += e;
    }
    total[q] = sum(all);
  }
  int64_t c = 0;
  for (; c + 4 * W <= C; c += 4 * W) mix<Q, 4>(query, score, room, v, C, c, shared);
  for (; c + W <= C; c += W) mix<Q, 1>(query, score, room, v, C, c, shared);
  for (int q = 0; q < Q; q++) {
    float* y = query[q].y;
    for (int64_t i = c; i < C; i++) {
      y[i] = 0;
      for (int64_t s = 0; s <= query[q].last; s++) y[i] = std::fma((float)v[s * C + i], score[q * room + s], y[i]);
    }
    for (int64_t i = 0; i < C; i++) y[i] /= total[q];
  }
}

using MaybeTensors = c10::List<std::optional<at::Tensor>>;

// A layer of a model as Block in model.py has it: two norms (D), the matrices qkv, out, gate_up and down, see Matrix,
// and caches (B, G, S, C). With a group of processes, this process's part of it.
struct Layer : torch::CustomClassHolder {
  const at::Tensor norm1, norm2, k, v;
  const std::vector<at::Tensor> weights;
  const MaybeTensors scales, zeros;
  const int64_t D, H, G, C, F;
  const Matrix qkv, out, gate_up, down;

  Layer(at::Tensor norm1, at::Tensor norm2, at::Tensor k, at::Tensor v, std::vector<at::Tensor> weights,
        MaybeTensors scales, MaybeTensors zeros)
      : norm1(norm1),
        norm2(norm2),
        k(k),
        v(v),
        weights(weights),
        scales(scales),
        zeros(zeros),
        D(norm1.numel()),
        H(matrix(1).K / k.size(3)),
        G(k.size(1)),
        C(k.size(3)),
        F(matrix(3).K),
        qkv(matrix(0).first((H + 2 * G) * C)),
        out(matrix(1).first(D)),
        gate_up(matrix(2).first(2 * F)),
        down(matrix(3).first(D)) {
    TORCH_CHECK(k.is_contiguous() && v.is_contiguous() && v.sizes() == k.sizes() && C <= 512);
    TORCH_CHECK(norm2.numel() == D && qkv.K == D && out.K == H * C && gate_up.K == D);
    for (const at::Tensor& t : {norm1, norm2, v}) TORCH_CHECK(t.scalar_type() == k.scalar_type());
  }

  Matrix matrix(int i) const { return Matrix(weights.at(i), scales[i], zeros[i]); }
};
using LayerList = std::vector<c10::intrusive_ptr<Layer>>;

// One of PyTorch's functional collectives; its group of processes goes by name.
template <typename... Args>
static at::Tensor collective(const char* name, const Args&... args) {
  torch::jit::Stack stack{c10::IValue(args)...};
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(&stack);
  return stack[0].toTensor();
}

// One pass over the layers of a model, one after the other, for L tokens in each of B sequences. With a group of
// processes, of which each has a part of every layer, the parts' outputs are added in the order of the ranks, so that all
// processes have the same sum.
template <typename T>
struct Pass {
  const LayerList& layers;
  const int64_t B, L, M, D, H, G, C, F;  // M = B * L
  int64_t S;                             // rows that every layer's caches have
  const float eps;
  const std::optional<std::string> group;
  const int64_t processes;
  at::Tensor gathered;  // (processes, M, D)
  std::exception_ptr failed;
  std::vector<int64_t> pos;                    // (L)
  std::vector<float> cos, sin;                 // (L, C/2)
  std::vector<float> x;                        // (M, D)
  std::vector<float> qkv, mixed, hidden, act;  // (M, (H + 2G) C), (M, H C), (M, 2F), (M, F)

  Pass(const LayerList& layers, int64_t B, int64_t L, double eps, std::optional<std::string> group, int64_t processes)
      : layers(layers),
        B(B),
        L(L),
        M(B * L),
        D(first().D),
        H(first().H),
        G(first().G),
        C(first().C),
        F(first().F),
        S(first().k.size(2)),
        eps(eps),
        group(group),
        processes(processes),
        pos(L),
        cos(L * C / 2),
        sin(L * C / 2),
        x(M * D),
        qkv(M * std::max((H + 2 * G) * C, D)),
        mixed(M * H * C),
        hidden(M * std::max(2 * F, D)),
        act(M * F) {
    for (const auto& l : layers)
      TORCH_CHECK(l->D == D && l->H == H && l->G == G && l->C == C && l->F == F && l->k.size(0) == B &&
                  l->k.scalar_type() == c10::CppTypeToScalarType<T>());
    for (const auto& l : layers) S = std::min(S, l->k.size(2));
  }

  const Layer& first() const { return *layers.at(0); }

  // The positions (L) of the tokens, and by how much RoPE turns there.
  void place(const int64_t* positions, const at::Tensor& inv_freq) {
    const float* freq = inv_freq.const_data_ptr<float>();
    for (int64_t t = 0; t < L; t++) {
      pos[t] = positions[t];
      for (int64_t i = 0; i < C / 2; i++) {
        const float angle = (float)pos[t] * freq[i];
        cos[t * C / 2 + i] = std::cos(angle);
        sin[t * C / 2 + i] = std::sin(angle);
      }
    }
  }

  // x becomes the rows of the table (V, D) that ids (M) name.
  void embed(const int64_t* ids, const at::Tensor& table) {
    for (int64_t m = 0; m < M; m++) {
      const T* row = table.const_data_ptr<T>() + ids[m] * D;
      std::copy(row, row + D, &x[m * D]);
    }
  }

  // A member's part in the pass: x after the layers, whose keys and values go into the caches.
  void run(Member me) {
    const int64_t room = (pos[L - 1] + W) / W * W;
    std::vector<float> normed(M * D), score(TOGETHER * room);
    // Adds y's columns [begin, end) to x, in the precision that hidden states have between layers.
    auto add = [&](const std::vector<float>& y, int64_t begin, int64_t end) {
      for (int64_t m = 0; m < M; m++)
        for (int64_t i = m * D + begin; i < m * D + end; i++) x[i] = (float)(T)(x[i] + y[i]);
    };
    // Adds to columns [begin, end) of y (M, D) the other processes' y. False if one of them is lost, because no
    // exception may leave the team.
    auto add_others = [&](std::vector<float>& y, int64_t begin, int64_t end) {
      if (!group) return true;
      me.meet(true);
      if (me.index == 0) try {  // the calling thread
          at::Tensor own = at::from_blob(y.data(), {M, D}, at::kFloat);
          gathered = collective("_c10d_functional::wait_tensor",
                                collective("_c10d_functional::all_gather_into_tensor", own, processes, *group));
        } catch (...) {
          failed = std::current_exception();
        }
      me.meet(true);
      if (failed) return false;
      const float* part = gathered.const_data_ptr<float>();
      for (int64_t m = 0; m < M; m++)
        for (int64_t i = m * D + begin; i < m * D + end; i++) {
          y[i] = part[i];
          for (int64_t p = 1; p < processes; p++) y[i] += part[p * M * D + i];
        }
      return true;
    };
    auto normalize_rows = [&](const at::Tensor& w) {
      for (int64_t m = 0; m < M; m++) normalize(&x[m * D], w.const_data_ptr<T>(), &normed[m * D], D, eps);
    };
    auto [d_begin, d_end] = me.share(D);
    auto [f_begin, f_end] = me.share(F);
    for (const auto& own : layers) {
      const Layer& layer = *own;
      T *k = layer.k.template mutable_data_ptr<T>(), *v = layer.v.template mutable_data_ptr<T>();
      const int64_t rows = layer.k.size(2);
      normalize_rows(layer.norm1);
      auto [begin, end] = me.share(layer.qkv.N);
      product(normed.data(), M, layer.qkv, qkv.data(), begin, end);
      me.meet();
      // RoPE on queries and keys. Keys and values go into the caches.
      for (int64_t i = me.index; i < M * (H + G); i += me.count) {
        int64_t m = i / (H + G), head = i % (H + G), b = m / L, t = m % L;
        float* row = &qkv[(m * (H + 2 * G) + head) * C];
        rotate(row, &cos[t * C / 2], &sin[t * C / 2], C);
        if (head < H) continue;
        int64_t cache = ((b * G + head - H) * rows + pos[t]) * C;
        for (int64_t c = 0; c < C; c++) k[cache + c] = (T)row[c], v[cache + c] = (T)row[G * C + c];
      }
      me.meet();
      // i counts (b, h, t), so that neighbours share keys.
      const int64_t shared = H / G * L, end_i = M * H * (me.index + 1) / me.count;
      for (int64_t i = M * H * me.index / me.count, count; i < end_i; i += count) {
        count = std::min({end_i - i, shared - i % shared, (int64_t)TOGETHER});
        Query query[TOGETHER];
        for (int64_t j = 0; j < count; j++) {
          int64_t t = (i + j) % L, h = (i + j) / L % H, m = (i + j) / L / H * L + t;
          query[j] = {&qkv[(m * (H + 2 * G) + h) * C], &mixed[(m * H + h) * C], pos[t]};
        }
        const int64_t cache = i / shared * rows * C;
        switch (count) {
          case 1: attend<1>(query, k + cache, v + cache, C, score.data(), room); break;
          case 2: attend<2>(query, k + cache, v + cache, C, score.data(), room); break;
          case 3: attend<3>(query, k + cache, v + cache, C, score.data(), room); break;
          case 4: attend<4>(query, k + cache, v + cache, C, score.data(), room); break;
        }
      }
      me.meet();
      product(mixed.data(), M, layer.out, hidden.data(), d_begin, d_end);
      if (!add_others(hidden, d_begin, d_end)) return;
      add(hidden, d_begin, d_end);
      me.meet();
      normalize_rows(layer.norm2);
      product(normed.data(), M, layer.gate_up, hidden.data(), f_begin, f_end);
      product(normed.data(), M, layer.gate_up, hidden.data(), F + f_begin, F + f_end);
      for (int64_t m = 0; m < M; m++)
        gated(&hidden[m * 2 * F + f_begin], &hidden[(m * 2 + 1) * F + f_begin], &act[m * F + f_begin], f_end - f_begin);
      me.meet();
      product(act.data(), M, layer.down, qkv.data(), d_begin, d_end);
      if (!add_others(qkv, d_begin, d_end)) return;
      add(qkv, d_begin, d_end);
      me.meet();
    }
  }
};

// x, ids (B, L) of rows of the embedding (V, D) or hidden states (B, L, D), at positions pos (L) -> hidden states
// (B, L, D) after the layers. inv_freq (C/2): RoPE's turn from one position to the next.
template <typename T>
static at::Tensor run_layers(const at::Tensor& x, const at::Tensor& pos, const at::Tensor& inv_freq,
                             const at::Tensor& embedding, const LayerList& layers, double eps,
                             std::optional<std::string> group, int64_t processes) {
  Pass<T> pass(layers, x.size(0), x.size(1), eps, group, processes);
  at::Tensor input = x.contiguous(), y = at::empty({pass.B, pass.L, pass.D}, embedding.options());
  TORCH_CHECK(pos.is_contiguous() && pos.numel() == pass.L && inv_freq.is_contiguous());
  TORCH_CHECK_INDEX(pos.const_data_ptr<int64_t>()[pass.L - 1] < pass.S, "no cache row for that position");
  pass.place(pos.const_data_ptr<int64_t>(), inv_freq);
  if (x.scalar_type() == at::kLong) {
    const int64_t* ids = input.const_data_ptr<int64_t>();
    for (int64_t m = 0; m < pass.M; m++) TORCH_CHECK_INDEX(ids[m] >= 0 && ids[m] < embedding.size(0), "no such token");
    pass.embed(ids, embedding);
  } else {
    const T* from = input.template const_data_ptr<T>();
    std::copy(from, from + input.numel(), pass.x.begin());
  }
  team([&](Member me) { pass.run(me); });
  if (pass.failed) std::rethrow_exception(pass.failed);
  std::copy(pass.x.begin(), pass.x.end(), y.template mutable_data_ptr<T>());
  return y;
}

at::Tensor layers(const at::Tensor& x, const at::Tensor& pos, const at::Tensor& inv_freq, const at::Tensor& embedding,
                  const LayerList& layers, double eps, std::optional<std::string> group, int64_t processes) {
  auto run = embedding.scalar_type() == at::kFloat ? run_layers<float> : run_layers<c10::BFloat16>;
  return run(x, pos, inv_freq, embedding, layers, eps, group, processes);
}

// The index of the largest of x [begin, end).
static int64_t largest(const float* x, int64_t begin, int64_t end) {
  vec top = vec{} - INFINITY;
  int64_t i = begin;
  for (; i + W <= end; i += W) top = load(x + i) > top ? load(x + i) : top;
  float most = -INFINITY;
  for (int j = 0; j < W; j++) most = std::max(most, top[j]);
  for (; i < end; i++) most = std::max(most, x[i]);
  return std::min<int64_t>(std::find(x + begin, x + end, most) - x, end - 1);
}

// The most likely k tokens behind `token` (1, 1) at pos (1), by these layers, the norm (D) and the head, whose outputs
// from `vocabulary` on don't count -> the tokens (1, k), and the hidden states (1, k, D) that each was chosen from.
template <typename T>
static std::tuple<at::Tensor, at::Tensor> draft_tokens(const at::Tensor& token, const at::Tensor& pos, int64_t k,
                                                       const at::Tensor& inv_freq, const at::Tensor& embedding,
                                                       const LayerList& layers, const at::Tensor& norm,
                                                       const Matrix& head, int64_t vocabulary, double eps) {
  Pass<T> pass(layers, 1, 1, eps, {}, 1);
  const int64_t D = pass.D;
  TORCH_CHECK(head.K == D && norm.numel() == D && vocabulary <= head.N && inv_freq.is_contiguous());
  at::Tensor states = at::empty({1, k, D}, embedding.options()), drafted = at::empty({1, k}, token.options());
  int64_t last = token.item<int64_t>(), position = pos.item<int64_t>();
  TORCH_CHECK_INDEX(position + k <= pass.S, "no cache rows for these positions");
  std::vector<float> logits(head.N);
  std::vector<int64_t> best;  // of each member; how many there are shows in the team only
  team([&](Member me) {
    std::vector<float> normed(D);
    auto [begin, end] = me.share(vocabulary);
    for (int64_t i = 0; i < k; i++) {
      if (me.index == 0) {
        best.resize(me.count);
        pass.embed(&last, embedding);
        pass.place(&position, inv_freq);
      }
      me.meet();
      pass.run(me);
      normalize(pass.x.data(), norm.const_data_ptr<T>(), normed.data(), D, eps);
      product(normed.data(), 1, head, logits.data(), begin, end);
      best[me.index] = begin < end ? largest(logits.data(), begin, end) : 0;
      me.meet();
      if (me.index > 0) continue;
      last = best[0];
      for (int64_t j = 1; j < me.count; j++)
        if (logits[best[j]] > logits[last]) last = best[j];
      drafted.mutable_data_ptr<int64_t>()[i] = last;
      std::copy(pass.x.begin(), pass.x.end(), states.template mutable_data_ptr<T>() + i * D);
      position++;
    }
  });
  return {drafted, states};
}

std::tuple<at::Tensor, at::Tensor> draft(const at::Tensor& token, const at::Tensor& pos, int64_t k,
                                         const at::Tensor& inv_freq, const at::Tensor& embedding,
                                         const LayerList& layers, const at::Tensor& norm, const at::Tensor& head,
                                         const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& zero,
                                         int64_t vocabulary, double eps) {
  auto run = embedding.scalar_type() == at::kFloat ? draft_tokens<float> : draft_tokens<c10::BFloat16>;
  return run(token, pos, k, inv_freq, embedding, layers, norm, Matrix(head, scale, zero), vocabulary, eps);
}

// x (..., K) float32 or bfloat16 times w transposed, see Matrix -> (..., N) of x's type.
at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& scale,
                  const std::optional<at::Tensor>& zero) {
  Matrix matrix(w, scale, zero);
  int64_t M = x.numel() / matrix.K;
  TORCH_CHECK(x.size(-1) == matrix.K);
  auto shape = x.sizes().vec();
  shape.back() = matrix.N;
  at::Tensor wide = x.to(at::kFloat).contiguous(), y = at::empty(shape, wide.options());
  team([&](Member me) {
    auto [begin, end] = me.share(matrix.N);
    product(wide.const_data_ptr<float>(), M, matrix, y.mutable_data_ptr<float>(), begin, end);
  });
  return y.to(x.scalar_type());
}

// x (..., D), w (D) of x's type -> (..., D).
at::Tensor norm(const at::Tensor& x, const at::Tensor& w, double eps) {
  TORCH_CHECK(w.is_contiguous() && x.size(-1) == w.size(0) && x.scalar_type() == w.scalar_type());
  int64_t D = w.size(0);
  at::Tensor wide = x.to(at::kFloat).contiguous(), y = at::empty_like(wide);
  for (int64_t i = 0; i < x.numel(); i += D) {
    const float* row = wide.const_data_ptr<float>() + i;
    float* out = y.mutable_data_ptr<float>() + i;
    if (x.scalar_type() == at::kFloat) normalize(row, w.const_data_ptr<float>(), out, D, eps);
    else normalize(row, w.const_data_ptr<c10::BFloat16>(), out, D, eps);
  }
  return y.to(x.scalar_type());
}

TORCH_LIBRARY(layerskip, m) {
  m.class_<Layer>("Layer").def(torch::init<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>,
                                           MaybeTensors, MaybeTensors>());
  m.def(
      "layers(Tensor x, Tensor pos, Tensor inv_freq, Tensor embedding, __torch__.torch.classes.layerskip.Layer[] "
      "layers, "
      "float eps, str? group=None, int processes=1) -> Tensor");
  m.def(
      "draft(Tensor token, Tensor pos, int k, Tensor inv_freq, Tensor embedding, "
      "__torch__.torch.classes.layerskip.Layer[] layers, Tensor norm, Tensor head, Tensor? scale, Tensor? zero, "
      "int vocabulary, float eps) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor w, Tensor? scale=None, Tensor? zero=None) -> Tensor");
  m.def("norm(Tensor x, Tensor w, float eps) -> Tensor");
}
TORCH_LIBRARY_IMPL(layerskip, CPU, m) {
  m.impl("layers", layers);
  m.impl("draft", draft);
  m.impl("linear", linear);
  m.impl("norm", norm);
}
