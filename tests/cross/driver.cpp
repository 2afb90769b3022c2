// Runs every CPU kernel of one instruction set on fixed inputs and prints each result's error against double precision.
//
// One line per result: name, dtype and error, max |result - exact| / max |exact|. No torch is needed, so that the
// kernels of another architecture can be run under an emulator. See __main__.py for what the errors are compared with.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cpu/standalone.h"

using namespace pygpt;
using namespace pygpt::cpu::PYGPT_ISA;

namespace {

using Values = std::vector<double>;

// ------------------------------------------------------------------------------- storage types
int64_t bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

void store(void* data, DType dtype, int64_t i, double value) {
  if (dtype == DType::f64) static_cast<double*>(data)[i] = value;
  if (dtype == DType::f32) static_cast<float*>(data)[i] = float(value);
  if (dtype == DType::f16) {
    const int exponent = std::max(value == 0 ? -14 : std::ilogb(value), -14);
    const auto mantissa = uint16_t(std::nearbyint(std::ldexp(std::fabs(value), 10 - exponent)));
    static_cast<uint16_t*>(data)[i] = uint16_t((std::signbit(value) << 15) | (mantissa + ((exponent + 14) << 10)));
  }
  if (dtype == DType::bf16) {
    const float rounded_once = float(value);
    uint32_t bits;
    std::memcpy(&bits, &rounded_once, 4);
    static_cast<uint16_t*>(data)[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

double load(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::f64) return static_cast<const double*>(data)[i];
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t half = static_cast<const uint16_t*>(data)[i];
  if (dtype == DType::f16) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return std::numeric_limits<double>::quiet_NaN();  // no result may overflow
    const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return half >> 15 ? -magnitude : magnitude;
  }
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// An array in the storage type. Inputs also have their rounded values in double.
struct Array {
  DType dtype;
  std::shared_ptr<void> memory;
  Values values;

  Array(DType dtype, int64_t n)
      : dtype(dtype), memory(std::aligned_alloc(64, size_t(n * bytes(dtype) + 127) / 64 * 64), std::free), values(n) {}
  void* data() const { return memory.get(); }
  double operator[](int64_t i) const { return values[size_t(i)]; }
};

uint64_t state = 1;
double uniform() {  // in (-1, 1)
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(state >> 11) - (int64_t(1) << 52)) / double(int64_t(1) << 52);
}

Array input(DType dtype, int64_t n) {
  Array a(dtype, n);
  for (int64_t i = 0; i < n; i++) {
    store(a.data(), dtype, i, uniform() + uniform());
    a.values[size_t(i)] = load(a.data(), dtype, i);
  }
  return a;
}

DType statistics(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }
const char* text(DType dtype) {
  return dtype == DType::f64    ? "float64"
         : dtype == DType::f32  ? "float32"
         : dtype == DType::bf16 ? "bfloat16"
                                : "float16";
}

void report(const std::string& name, const Array& result, const Values& exact) {
  double error = 0, scale = 0;
  for (size_t i = 0; i < exact.size(); i++) {
    const double difference = std::fabs(load(result.data(), result.dtype, int64_t(i)) - exact[i]);
    error = difference <= error ? error : difference;  // a NaN stays
    scale = std::fmax(scale, std::fabs(exact[i]));
  }
  std::printf("%s\t%s\t%.17g\n", name.c_str(), text(result.dtype), error / scale);
}

// ------------------------------------------------------------------------------- products, in double
// (m, n) = a (m, k) b (k, n), each given by a function of its two indices.
using Matrix = std::function<double(int64_t, int64_t)>;
Values product(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b) {
  Values c(size_t(m * n));
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++)
      for (int64_t l = 0; l < k; l++) c[size_t(i * n + j)] += a(i, l) * b(l, j);
  return c;
}
template <class V>
Matrix rows(const V& v, int64_t stride) {
  return [&v, stride](int64_t i, int64_t j) { return v[size_t(i * stride + j)]; };
}
template <class V>
Matrix columns(const V& v, int64_t stride) {
  return [&v, stride](int64_t i, int64_t j) { return v[size_t(j * stride + i)]; };
}
template <class V>
Values column_sums(int64_t m, int64_t n, const V& v) {
  Values sums(size_t(n), 0);
  for (int64_t i = 0; i < m * n; i++) sums[size_t(i % n)] += v[size_t(i)];
  return sums;
}

// ------------------------------------------------------------------------------- the ops
double activated(Activation a, double x) {
  if (a == Activation::gelu) return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
  if (a == Activation::gelu_tanh) return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  if (a == Activation::silu) return x / (1 + std::exp(-x));
  return x <= 0 ? 0 : a == Activation::relu ? x : x * x;
}
double derivative(Activation a, double x) {
  if (a == Activation::gelu)
    return 0.5 * std::erfc(-x * std::sqrt(0.5)) + x * std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI);
  if (a == Activation::gelu_tanh) {
    const double scale = 2 * std::sqrt(2 / M_PI), p = 1 / (1 + std::exp(-scale * (x + 0.044715 * x * x * x)));
    return p + x * p * (1 - p) * scale * (1 + 3 * 0.044715 * x * x);
  }
  if (a == Activation::silu) return (1 + x / (1 + std::exp(x))) / (1 + std::exp(-x));
  return x <= 0 ? 0 : a == Activation::relu ? 1 : 2 * x;
}
const char* text(Activation a) {
  const char* names[] = {"gelu", "gelu_tanh", "relu", "relu2", "swiglu"};
  return names[int(a)];
}
const Activation kActivations[] = {Activation::gelu, Activation::gelu_tanh, Activation::relu, Activation::relu2};

void activation(DType dtype, Activation which, int64_t n) {
  const Array x = input(dtype, n), dy = input(dtype, n), y(dtype, n), dx(dtype, n);
  ActivationArgs a = {};
  a.dtype = dtype, a.activation = which, a.n = n;
  a.x = x.data(), a.y = y.data(), a.dy = dy.data(), a.dx = dx.data();
  activation_fwd(a);
  activation_bwd(a);
  Values value, gradient;
  for (int64_t i = 0; i < n; i++)
    value.push_back(activated(which, x[i])), gradient.push_back(derivative(which, x[i]) * dy[i]);
  report(std::string(text(which)) + " y", y, value);
  report(std::string(text(which)) + " dx", dx, gradient);
}

void linear(DType dtype, int64_t M, int64_t K, int64_t N) {
  const Array x = input(dtype, M * K), w = input(dtype, N * K), b = input(dtype, N), dy = input(dtype, M * N);
  const Array y(dtype, M * N), dx(dtype, M * K), dw(dtype, N * K), db(dtype, N);
  LinearArgs a = {};
  a.dtype = dtype, a.rows = M, a.in = K, a.out = N, a.bias = b.data();
  a.x = {x.data(), K}, a.weight = {w.data(), K}, a.y = {y.data(), N}, a.dy = {dy.data(), N};
  a.dx = dx.data(), a.dw = dw.data(), a.db = db.data();
  linear_fwd(a);
  linear_bwd(a);
  Values exact = product(M, N, K, rows(x, K), columns(w, K));
  for (int64_t i = 0; i < M * N; i++) exact[size_t(i)] += b[i % N];
  const std::string name = "linear " + std::to_string(M) + "x" + std::to_string(K) + "x" + std::to_string(N);
  report(name + " y", y, exact);
  report(name + " dx", dx, product(M, K, N, rows(dy, N), rows(w, K)));
  report(name + " dw", dw, product(N, K, M, columns(dy, N), rows(x, K)));
  report(name + " db", db, column_sums(M, N, dy));
}

// silu is gated.
void mlp(DType dtype, Activation which, int64_t M, int64_t C, int64_t H) {
  const bool gated = which == Activation::silu;
  const int64_t F = gated ? 2 * H : H;
  const Array x = input(dtype, M * C), fc = input(dtype, F * C), fc_bias = input(dtype, F), proj = input(dtype, C * H);
  const Array proj_bias = input(dtype, C), dy = input(dtype, M * C), y(dtype, M * C), hidden(dtype, M * H);
  const Array pre(dtype, M * F), dpre(dtype, M * F), dx(dtype, M * C), dfc(dtype, F * C), dfc_bias(dtype, F);
  const Array dproj(dtype, C * H), dproj_bias(dtype, C);
  MlpArgs a = {};
  a.dtype = dtype, a.activation = which, a.gated = gated, a.rows = M, a.in = C, a.hidden_dim = H, a.out = C;
  a.x = {x.data(), C}, a.fc_weight = {fc.data(), C}, a.proj_weight = {proj.data(), H}, a.dy = {dy.data(), C};
  a.fc_bias = fc_bias.data(), a.proj_bias = proj_bias.data(), a.y = y.data(), a.hidden = hidden.data();
  a.pre = saves_input(which) ? pre.data() : nullptr, a.dpre = dpre.data(), a.dx = dx.data();
  a.dfc_weight = dfc.data(), a.dfc_bias = dfc_bias.data(), a.dproj_weight = dproj.data();
  a.dproj_bias = dproj_bias.data();
  mlp_fwd(a);
  mlp_bwd(a);
  Values exact_pre = product(M, F, C, rows(x, C), columns(fc, C)), exact_hidden;
  for (int64_t i = 0; i < M * F; i++) exact_pre[size_t(i)] += fc_bias[i % F];
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < H; j++) {
      const double* p = &exact_pre[size_t(i * F + j)];
      exact_hidden.push_back(activated(which, p[0]) * (gated ? p[H] : 1));
    }
  Values exact = product(M, C, H, rows(exact_hidden, H), columns(proj, H));
  for (int64_t i = 0; i < M * C; i++) exact[size_t(i)] += proj_bias[i % C];
  const Values d = product(M, H, C, rows(dy, C), rows(proj, H));
  Values exact_dpre(size_t(M * F));
  for (int64_t i = 0; i < M; i++)
    for (int64_t j = 0; j < H; j++) {
      const double *p = &exact_pre[size_t(i * F + j)], of_hidden = d[size_t(i * H + j)];
      double* to = &exact_dpre[size_t(i * F + j)];
      to[0] = of_hidden * derivative(which, p[0]) * (gated ? p[H] : 1);
      if (gated) to[H] = of_hidden * activated(which, p[0]);
    }
  const std::string name = std::string("mlp ") + text(which);
  report(name + " y", y, exact);
  report(name + " dx", dx, product(M, C, F, rows(exact_dpre, F), rows(fc, C)));
  report(name + " dfc_weight", dfc, product(F, C, M, columns(exact_dpre, F), rows(x, C)));
  report(name + " dfc_bias", dfc_bias, column_sums(M, F, exact_dpre));
  report(name + " dproj_weight", dproj, product(C, H, M, columns(dy, C), rows(exact_hidden, H)));
  report(name + " dproj_bias", dproj_bias, column_sums(M, C, dy));
}

// layer_norm, or with centred false rms_norm.
void norm(DType dtype, bool centred, int64_t M, int64_t N) {
  const Array x = input(dtype, M * N), w = input(dtype, N), b = input(dtype, N), dy = input(dtype, M * N);
  const Array y(dtype, M * N), mean(statistics(dtype), M), rstd(statistics(dtype), M);
  const Array dx(dtype, M * N), dw(dtype, N), db(dtype, N);
  NormArgs a = {};
  a.dtype = a.sum_dtype = a.parameter_dtype = dtype, a.rows = M, a.cols = N, a.eps = 1e-5;
  a.x = {x.data(), N}, a.dy = {dy.data(), N};
  a.weight = w.data(), a.y = y.data(), a.rstd = rstd.data(), a.dx = dx.data(), a.dw = dw.data();
  if (centred) a.bias = b.data(), a.mean = mean.data(), a.db = db.data();
  norm_fwd(a);
  norm_bwd(a);
  Values exact, xhat, exact_dx, exact_rstd;
  for (int64_t i = 0; i < M; i++) {
    double sum = 0, squares = 0, of_g = 0, of_gx = 0;
    for (int64_t j = 0; j < N; j++) sum += x[i * N + j];
    const double centre = centred ? sum / double(N) : 0;
    for (int64_t j = 0; j < N; j++) squares += std::pow(x[i * N + j] - centre, 2);
    exact_rstd.push_back(1 / std::sqrt(squares / double(N) + a.eps));
    for (int64_t j = 0; j < N; j++) {
      xhat.push_back((x[i * N + j] - centre) * exact_rstd.back());
      exact.push_back(xhat.back() * w[j] + (centred ? b[j] : 0));
      of_g += dy[i * N + j] * w[j], of_gx += dy[i * N + j] * w[j] * xhat.back();
    }
    for (int64_t j = 0; j < N; j++) {
      const double g = dy[i * N + j] * w[j] - (centred ? of_g / double(N) : 0);
      exact_dx.push_back((g - xhat[size_t(i * N + j)] * of_gx / double(N)) * exact_rstd.back());
    }
  }
  Values terms;
  for (int64_t i = 0; i < M * N; i++) terms.push_back(dy[i] * xhat[size_t(i)]);
  const std::string name = centred ? "layer_norm" : "rms_norm";
  report(name + " y", y, exact);
  report(name + " rstd", rstd, exact_rstd);
  report(name + " dx", dx, exact_dx);
  report(name + " dw", dw, column_sums(M, N, terms));
  if (centred) report(name + " db", db, column_sums(M, N, dy));
}

void attention(DType dtype, int64_t L, int64_t S, int64_t E, int64_t Ev, bool causal) {
  const Array q = input(dtype, L * E), k = input(dtype, S * E), v = input(dtype, S * Ev), dout = input(dtype, L * Ev);
  const Array out(dtype, L * Ev), lse(statistics(dtype), L), dq(dtype, L * E), dk(dtype, S * E), dv(dtype, S * Ev);
  AttentionArgs a = {};
  a.dtype = dtype, a.batch = a.heads = a.kv_heads = 1, a.sequences.q_len = L, a.sequences.k_len = S, a.head_dim = E,
  a.v_dim = Ev;
  a.reach.right = causal ? 0 : -1, a.scores.scale = 1 / std::sqrt(double(E)), a.lse_stride[0] = a.lse_stride[1] = L,
  a.lse = lse.data();
  const auto heads = [](const Array& t, int64_t T, int64_t width) {
    return Heads{t.data(), {T * width, T * width, width, 1}};
  };
  a.q = heads(q, L, E), a.k = heads(k, S, E), a.v = heads(v, S, Ev), a.out = heads(out, L, Ev);
  a.dout = heads(dout, L, Ev), a.dq = heads(dq, L, E), a.dk = heads(dk, S, E), a.dv = heads(dv, S, Ev);
  attention_fwd(a);
  attention_bwd(a);
  Values p = product(L, S, E, rows(q, E), columns(k, E)), exact_lse;
  for (int64_t i = 0; i < L; i++) {
    double sum = 0;
    for (int64_t j = 0; j < S; j++) {
      double& score = p[size_t(i * S + j)];
      score = causal && j > i ? 0 : std::exp(a.scores.scale * score);
      sum += score;
    }
    for (int64_t j = 0; j < S; j++) p[size_t(i * S + j)] /= sum;
    exact_lse.push_back(std::log(sum));
  }
  const Values exact = product(L, Ev, S, rows(p, S), rows(v, Ev));
  Values ds = product(L, S, Ev, rows(dout, Ev), columns(v, Ev));
  for (int64_t i = 0; i < L; i++) {
    double delta = 0;
    for (int64_t j = 0; j < Ev; j++) delta += dout[i * Ev + j] * exact[size_t(i * Ev + j)];
    for (int64_t j = 0; j < S; j++)
      ds[size_t(i * S + j)] = a.scores.scale * p[size_t(i * S + j)] * (ds[size_t(i * S + j)] - delta);
  }
  const std::string name = "attention " + std::to_string(L) + "x" + std::to_string(S) + (causal ? " causal" : "");
  report(name + " out", out, exact);
  report(name + " lse", lse, exact_lse);
  report(name + " dq", dq, product(L, E, S, rows(ds, S), rows(k, E)));
  report(name + " dk", dk, product(S, E, L, columns(ds, S), rows(q, E)));
  report(name + " dv", dv, product(S, Ev, L, columns(p, S), rows(dout, Ev)));
}

}  // namespace

int main() {
  for (DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (Activation which : kActivations) activation(dtype, which, 1003), mlp(dtype, which, 33, 41, 83);
    mlp(dtype, Activation::silu, 33, 41, 83);
    for (int64_t rows : {1, 5, 37, 300}) linear(dtype, rows, 61, 45);
    linear(dtype, 64, 256, 272);
    for (bool centred : {true, false}) norm(dtype, centred, 19, 301);
    for (bool causal : {true, false})
      attention(dtype, 77, 101, 41, 27, causal), attention(dtype, causal ? 3 : 1, 150, 64, 64, causal);
  }
}
