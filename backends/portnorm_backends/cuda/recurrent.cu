// One step of a recurrent cell with its normalizers, beside the matrix product a = h · Uᵀ that comes before it (forward) or
// dh = da · U that comes after it (backward).
//
//     LSTM   (i, f, g, o) = split(u + N(a))  or  N(u + a);   c' = σ(f) c + σ(i) tanh(g);   h' = σ(o) tanh(N_c(c'))
//     GRU    b = N(a);   r = σ(u_r + b_r),  z = σ(u_z + b_z),  n = φ(u_n + r b_n);   h' = n + z (h − n)
//     RNN    h' = φ(u + N(a))  or  φ(N(u + a))
//
// N is layer or RMS normalization of each row, for all gates together, the candidate apart, or gate by gate (`step_…`: a block has a row);
// batch normalization of each feature over the rows, by the batch's own statistics or given ones (`batch_…`: a block has 8 hidden units and
// all rows); or a shift alone. A sequence that has ended keeps its state, gives 0, and enters no statistic. References:
// portnorm/cells/{lstm,gru,rnn}.py and portnorm/scan.py. Cotangents of gain and shift are sums over all steps, taken after the loop.

#include "common.cuh"

enum Cell { LSTM = 0, GRU = 1, RNN = 2 };
enum Kind { NOTHING = 0, LAYER = 1, RMS = 2, BATCH = 3 };
enum Place { NOWHERE = 0, HIDDEN = 1, SUM = 2 };
enum Partition { TOGETHER = 0, CANDIDATE_APART = 1, BY_GATE = 2 };
enum CellState { AS_IT_IS = 0, COPY = 1, STATE = 2 };

template <int CELL> struct GatesOf { static const int count = CELL == LSTM ? 4 : CELL == GRU ? 3 : 1; };

// Everything of a call but the number of the step; arrays are (time, batch, …) and have the type of the values, statistics theirs.
struct Step {
  const void *u;                                       // (T, B, G·H)
  void *a;                                             // (T, B, G·H); where it is normalized with more added to it, that is written back
  void *h, *c, *raw;                                   // (T+1, B, H); raw (T, B, H): c before it is normalized and written back
  void *y, *gates, *statistics, *cell_statistics;      // y, gates (T, B, G·H), rows (T, B, G, 4), (T, B, 4); batch (T, G·H, 4), (T, H, 4)
  const void *early, *gain, *shift, *cell_gain, *cell_shift;
  const Count *lengths;                                // (B,)
  const void *mean, *variance, *cell_mean, *cell_variance;      // given statistics (T, features), in the type of statistics
  void *seen_mean, *seen_variance, *seen_cell_mean, *seen_cell_variance;
  const void *dy, *dh;                                 // (T, B, H), (B, H)
  void *direct, *dc, *du, *da, *dn, *dnc;              // (B, H) each; (T, B, G·H) each: of u, of a, of N's result; (T, B, H) of N_c's
  double *sums, *cell_sums;                            // (T, 2, G·H), (T, 2, H): batch, cotangents of gain and shift of each step
  Count batch, hidden, h_step, c_step, a_step;         // the steps are 0 where one buffer serves all times
  Count kind, place, partition, state, relu, training, unbiased;
  double eps;
};

template <class T> __device__ inline const T* in(const void* p) { return static_cast<const T*>(p); }
template <class T> __device__ inline T* out(void* p) { return static_cast<T*>(p); }

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(fminf(-x, 88.0f))); }
__device__ inline double sigmoid(double x) { return 1.0 / (1.0 + exp(fmin(-x, 709.0))); }
__device__ inline float tangent(float x) { return tanhf(x); }
__device__ inline double tangent(double x) { return tanh(x); }
template <class S> __device__ inline S activation(const Step& s, S x) { return s.relu ? (x > 0 ? x : S(0)) : tangent(x); }
template <class S> __device__ inline S activation_vjp(const Step& s, S y, S d) { return s.relu ? (y > 0 ? d : S(0)) : d * (1 - y * y); }

template <class P, class S> __device__ inline S affine(S x, const P* gain, const P* shift, Count at) {
  if (gain) x *= widened(gain[at]);
  if (shift) x += widened(shift[at]);
  return x;
}

// -- layer and RMS normalization: a block has a row -----------------------------------------------------------------------------------------

// Which part of the gates has its statistics in common with gate g, as the first of them and the one after the last.
struct Gates {
  int first, end;
  __device__ static Gates with(int g, int gates, Count partition) {
    if (partition == BY_GATE) return {g, g + 1};
    if (partition == CANDIDATE_APART && gates > 1) return g == gates - 1 ? Gates{g, g + 1} : Gates{0, gates - 1};
    return {0, gates};
  }
};

// N numbers of each gate, combined over the gates of each part.
template <int G, class S, class Combine> __device__ inline void over_parts(S (&v)[G], Count partition, Combine combine) {
  S gate[G];
#pragma unroll
  for (int g = 0; g < G; g++) gate[g] = v[g];
#pragma unroll
  for (int g = 0; g < G; g++) {
    const Gates part = Gates::with(g, G, partition);
#pragma unroll
    for (int k = 0; k < G; k++) {
      if (k == part.first) v[g] = gate[k];
      else if (k > part.first && k < part.end) v[g] = combine(v[g], gate[k]);
    }
  }
}

// Normalize `value` (gates, units of this thread) of a row. The units of a thread are blockDim.x apart.
template <int G, int UNITS, class S>
__device__ inline void normalize_row(S (&value)[G][UNITS], int hidden, Count kind, Count partition, double eps, RowStatistics<S> (&found)[G]) {
  __shared__ S first[G];
  S sums[G], largest[G], scale[G], mean[G], rest[G];
  const auto valid = [&](int k) { return (int)(threadIdx.x + k * blockDim.x) < hidden; };
  __syncthreads();
#pragma unroll
  for (int g = 0; g < G; g++) {
    largest[g] = 0;
    if (threadIdx.x == 0) first[g] = value[g][0];
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if (valid(k)) largest[g] = larger(largest[g], magnitude(value[g][k]));
    }
  }
  __syncthreads();
  over_row(largest, Larger());
  over_parts(largest, partition, Larger());
#pragma unroll
  for (int g = 0; g < G; g++) {
    scale[g] = row_scale(largest[g], eps);
    const S start = first[Gates::with(g, G, partition).first] * scale[g];
    sums[g] = mean[g] = rest[g] = 0;
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      value[g][k] *= scale[g];
      if (valid(k)) sums[g] += value[g][k] - start;
    }
  }
  S count[G];
#pragma unroll
  for (int g = 0; g < G; g++) {
    const Gates part = Gates::with(g, G, partition);
    count[g] = S((part.end - part.first) * hidden);
  }
  if (kind == LAYER) {
    over_row(sums, Added());
    over_parts(sums, partition, Added());
#pragma unroll
    for (int g = 0; g < G; g++) {
      mean[g] = first[Gates::with(g, G, partition).first] * scale[g] + sums[g] / count[g];
      sums[g] = 0;
#pragma unroll
      for (int k = 0; k < UNITS; k++) {
        value[g][k] -= mean[g];
        if (valid(k)) sums[g] += value[g][k];
      }
    }
    over_row(sums, Added());
    over_parts(sums, partition, Added());
#pragma unroll
    for (int g = 0; g < G; g++) rest[g] = sums[g] / count[g];
  }
#pragma unroll
  for (int g = 0; g < G; g++) {
    sums[g] = 0;
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      value[g][k] -= rest[g];
      if (valid(k)) sums[g] += value[g][k] * value[g][k];
    }
  }
  over_row(sums, Added());
  over_parts(sums, partition, Added());
#pragma unroll
  for (int g = 0; g < G; g++) {
    found[g] = found_statistics(mean[g], rest[g], sums[g] / count[g], S(eps), scale[g]);
#pragma unroll
    for (int k = 0; k < UNITS; k++) value[g][k] *= found[g].rstd;
  }
}

// From the normalized values and d, the cotangents of the results before gain: those of what was normalized, into d.
template <int G, int UNITS, class S>
__device__ inline void normalize_row_vjp(
    S (&d)[G][UNITS], const S (&hat)[G][UNITS], int hidden, Count kind, Count partition, const RowStatistics<S> (&given)[G]) {
  S all[G], with[G];
#pragma unroll
  for (int g = 0; g < G; g++) {
    all[g] = with[g] = 0;
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if ((int)(threadIdx.x + k * blockDim.x) < hidden) {
        all[g] += d[g][k];
        with[g] += d[g][k] * hat[g][k];
      }
    }
  }
  over_row(all, Added());
  over_row(with, Added());
  over_parts(all, partition, Added());
  over_parts(with, partition, Added());
#pragma unroll
  for (int g = 0; g < G; g++) {
    const Gates part = Gates::with(g, G, partition);
    const S count = S((part.end - part.first) * hidden), a = kind == LAYER ? all[g] / count : S(0), b = with[g] / count;
#pragma unroll
    for (int k = 0; k < UNITS; k++) d[g][k] = ((d[g][k] - a) - hat[g][k] * b) * given[g].rstd * given[g].scale;
  }
}

template <class T, int CELL, int UNITS> __global__ void __launch_bounds__(512) step_forward(const Step s, Count t) {
  typedef typename StatisticsOf<T>::type S;
  const int G = GatesOf<CELL>::count;
  const int H = (int)s.hidden;
  const Count b = blockIdx.x, row = b * H, wide = row * G, all = s.batch * H, at = t * s.a_step + wide;
  T* h = out<T>(s.h) + t * s.h_step + row;
  T* c = CELL == LSTM ? out<T>(s.c) + t * s.c_step + row : nullptr;
  T* y = s.y ? out<T>(s.y) + t * all + row : nullptr;
  RowStatistics<S> *own = s.statistics ? out<RowStatistics<S>>(s.statistics) + (t * s.batch + b) * G : nullptr;
  RowStatistics<S> *cell_own = s.cell_statistics ? out<RowStatistics<S>>(s.cell_statistics) + t * s.batch + b : nullptr;
  T* raw = s.raw ? out<T>(s.raw) + t * all + row : nullptr;
  const auto valid = [&](int k) { return (int)(threadIdx.x + k * blockDim.x) < H; };
  const auto unit = [&](int k) { return (int)(threadIdx.x + k * blockDim.x); };
  if (s.lengths && t >= s.lengths[b]) {
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if (!valid(k)) continue;
      h[s.h_step + unit(k)] = h[unit(k)];
      if (CELL == LSTM) c[s.c_step + unit(k)] = c[unit(k)];
      if (y) y[unit(k)] = Narrowed<T>::of(S(0));
      if (raw) raw[unit(k)] = Narrowed<T>::of(S(0));
    }
    if (threadIdx.x == 0) {
      for (int g = 0; own && g < G; g++) own[g] = {0, 0, 0, 1};
      if (cell_own) *cell_own = {0, 0, 0, 1};
    }
    return;
  }
  const T *u = in<T>(s.u) + t * s.batch * G * H + wide, *early = in<T>(s.early), *gain = in<T>(s.gain), *shift = in<T>(s.shift);
  T *a = out<T>(s.a) + at, *gates = s.gates ? out<T>(s.gates) + at : nullptr;
  S value[G][UNITS], input[G][UNITS];
#pragma unroll
  for (int g = 0; g < G; g++) {
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      value[g][k] = input[g][k] = 0;
      if (!valid(k)) continue;
      const int i = g * H + unit(k);
      value[g][k] = widened(a[i]);
      input[g][k] = widened(u[i]);
      if (early) value[g][k] += widened(early[i]);
      if (s.place == SUM) value[g][k] += input[g][k];
      if (early || s.place == SUM) {
        const T rounded = Narrowed<T>::of(value[g][k]);
        if (own) a[i] = rounded;
        value[g][k] = widened(rounded);
      }
    }
  }
  if (s.place != NOWHERE) {
    RowStatistics<S> found[G];
    normalize_row(value, H, s.kind, s.partition, s.eps, found);
    if (own && threadIdx.x == 0) {
      for (int g = 0; g < G; g++) own[g] = found[g];
    }
  }
#pragma unroll
  for (int g = 0; g < G; g++) {
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if (valid(k)) value[g][k] = affine(value[g][k], gain, shift, g * H + unit(k));
    }
  }
  const auto total = [&](int g, int k) { return s.place == SUM ? value[g][k] : input[g][k] + value[g][k]; };
  if constexpr (CELL == LSTM) {
    S state[1][UNITS], open[UNITS];
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      state[0][k] = open[k] = 0;
      if (!valid(k)) continue;
      const S i = sigmoid(total(0, k)), f = sigmoid(total(1, k)), g = tangent(total(2, k)), o = sigmoid(total(3, k));
      state[0][k] = f * widened(c[unit(k)]) + i * g;
      open[k] = o;
      if (gates) {
        gates[unit(k)] = Narrowed<T>::of(i);
        gates[H + unit(k)] = Narrowed<T>::of(f);
        gates[2 * H + unit(k)] = Narrowed<T>::of(g);
        gates[3 * H + unit(k)] = Narrowed<T>::of(o);
      }
      const T rounded = Narrowed<T>::of(state[0][k]);
      if (s.state != STATE) c[s.c_step + unit(k)] = rounded;
      else if (raw) raw[unit(k)] = rounded;
      state[0][k] = widened(rounded);
    }
    if (s.state != AS_IT_IS) {
      RowStatistics<S> found[1];
      normalize_row(state, H, s.kind, TOGETHER, s.eps, found);
      if (cell_own && threadIdx.x == 0) *cell_own = found[0];
    }
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if (!valid(k)) continue;
      if (s.state != AS_IT_IS) state[0][k] = affine(state[0][k], in<T>(s.cell_gain), in<T>(s.cell_shift), unit(k));
      if (s.state == STATE) {
        c[s.c_step + unit(k)] = Narrowed<T>::of(state[0][k]);
        state[0][k] = widened(c[s.c_step + unit(k)]);
      }
      const T after = Narrowed<T>::of(open[k] * tangent(state[0][k]));
      h[s.h_step + unit(k)] = after;
      if (y) y[unit(k)] = after;
    }
  } else {
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if (!valid(k)) continue;
      S after;
      if constexpr (CELL == GRU) {
        const S r = sigmoid(total(0, k)), z = sigmoid(total(1, k)), n = activation(s, input[2][k] + r * value[2][k]);
        after = n + z * (widened(h[unit(k)]) - n);
        if (gates) {
          gates[unit(k)] = Narrowed<T>::of(r);
          gates[H + unit(k)] = Narrowed<T>::of(z);
          gates[2 * H + unit(k)] = Narrowed<T>::of(n);
        }
      } else {
        after = activation(s, total(0, k));
      }
      h[s.h_step + unit(k)] = Narrowed<T>::of(after);
      if (y) y[unit(k)] = Narrowed<T>::of(after);
    }
  }
}

template <class T, int CELL, int UNITS> __global__ void __launch_bounds__(512) step_backward(const Step s, Count t) {
  typedef typename StatisticsOf<T>::type S;
  const int G = GatesOf<CELL>::count;
  const int H = (int)s.hidden;
  const Count b = blockIdx.x, row = b * H, wide = row * G, all = s.batch * H, at = t * s.batch * G * H + wide;
  T *du = out<T>(s.du) + at, *da = out<T>(s.da) + at, *dn = s.dn ? out<T>(s.dn) + at : nullptr;
  T *direct = out<T>(s.direct) + row, *dc = CELL == LSTM ? out<T>(s.dc) + row : nullptr;
  T* dnc = s.dnc ? out<T>(s.dnc) + t * all + row : nullptr;
  const T *dh = in<T>(s.dh) + row, *dy = s.dy ? in<T>(s.dy) + t * all + row : nullptr;
  const auto valid = [&](int k) { return (int)(threadIdx.x + k * blockDim.x) < H; };
  const auto unit = [&](int k) { return (int)(threadIdx.x + k * blockDim.x); };
  if (s.lengths && t >= s.lengths[b]) {
    const T zero = Narrowed<T>::of(S(0));
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if (!valid(k)) continue;
      direct[unit(k)] = Narrowed<T>::of(S(widened(direct[unit(k)]) + widened(dh[unit(k)])));
      if (dnc) dnc[unit(k)] = zero;
#pragma unroll
      for (int g = 0; g < G; g++) {
        const int i = g * H + unit(k);
        du[i] = da[i] = zero;
        if (dn) dn[i] = zero;
      }
    }
    return;
  }
  const T *h = in<T>(s.h) + t * s.h_step + row, *a = in<T>(s.a) + at, *gates = in<T>(s.gates) + at;
  const T *gain = in<T>(s.gain), *shift = in<T>(s.shift);
  RowStatistics<S> own[G];
  S hat[G][UNITS], d[G][UNITS];
#pragma unroll
  for (int g = 0; g < G; g++) {
    own[g] = {0, 0, 0, 1};
    if (s.place != NOWHERE) own[g] = in<RowStatistics<S>>(s.statistics)[(t * s.batch + b) * G + g];
  }
#pragma unroll
  for (int g = 0; g < G; g++) {
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      hat[g][k] = d[g][k] = 0;
      if (valid(k) && (CELL == GRU || s.place != NOWHERE)) hat[g][k] = widened(a[g * H + unit(k)]);
      if (valid(k) && s.place != NOWHERE) hat[g][k] = normalized(hat[g][k], own[g]);
    }
  }
  S dhidden[UNITS];
#pragma unroll
  for (int k = 0; k < UNITS; k++) {
    dhidden[k] = 0;
    if (!valid(k)) continue;
    dhidden[k] = widened(dh[unit(k)]) + widened(direct[unit(k)]);
    if (dy) dhidden[k] += widened(dy[unit(k)]);
    direct[unit(k)] = Narrowed<T>::of(S(0));
  }
  if constexpr (CELL == LSTM) {
    const T *before = in<T>(s.c) + t * s.c_step + row, *after = before + s.c_step;
    const T* cell_gain = in<T>(s.cell_gain);
    RowStatistics<S> cell_own[1] = {{0, 0, 0, 1}};
    S cell_hat[1][UNITS], dcell[1][UNITS], dopen[UNITS], carried[UNITS];
    if (s.state != AS_IT_IS) cell_own[0] = in<RowStatistics<S>>(s.cell_statistics)[t * s.batch + b];
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      cell_hat[0][k] = dcell[0][k] = dopen[k] = carried[k] = 0;
      if (!valid(k)) continue;
      S state = widened(after[unit(k)]);
      if (s.state == COPY) {
        cell_hat[0][k] = normalized(state, cell_own[0]);
        state = affine(cell_hat[0][k], cell_gain, in<T>(s.cell_shift), unit(k));
      }
      if (s.state == STATE) cell_hat[0][k] = normalized(S(widened(in<T>(s.raw)[t * all + row + unit(k)])), cell_own[0]);
      const S tanh_c = tangent(state), o = widened(gates[3 * H + unit(k)]);
      dopen[k] = dhidden[k] * tanh_c * o * (1 - o);
      dcell[0][k] = dhidden[k] * o * (1 - tanh_c * tanh_c);
      carried[k] = widened(dc[unit(k)]);
      if (s.state == STATE) {
        dcell[0][k] += carried[k];
        carried[k] = 0;
      }
      if (dnc) dnc[unit(k)] = Narrowed<T>::of(dcell[0][k]);
      if (s.state != AS_IT_IS && cell_gain) dcell[0][k] *= widened(cell_gain[unit(k)]);
    }
    if (s.state != AS_IT_IS) normalize_row_vjp(dcell, cell_hat, H, s.kind, TOGETHER, cell_own);
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if (!valid(k)) continue;
      const S total = dcell[0][k] + carried[k];
      const S i = widened(gates[unit(k)]), f = widened(gates[H + unit(k)]), g = widened(gates[2 * H + unit(k)]);
      d[0][k] = total * g * i * (1 - i);
      d[1][k] = total * widened(before[unit(k)]) * f * (1 - f);
      d[2][k] = total * i * (1 - g * g);
      d[3][k] = dopen[k];
      dc[unit(k)] = Narrowed<T>::of(total * f);
    }
  } else if constexpr (CELL == GRU) {
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if (!valid(k)) continue;
      const S r = widened(gates[unit(k)]), z = widened(gates[H + unit(k)]), n = widened(gates[2 * H + unit(k)]);
      S reset = hat[2][k];
      if (s.place == NOWHERE && s.early) reset += widened(in<T>(s.early)[2 * H + unit(k)]);
      reset = affine(reset, gain, shift, 2 * H + unit(k));
      const S candidate = activation_vjp(s, n, dhidden[k] * (1 - z));
      d[0][k] = candidate * reset * r * (1 - r);
      d[1][k] = dhidden[k] * (widened(h[unit(k)]) - n) * z * (1 - z);
      d[2][k] = candidate * r;
      direct[unit(k)] = Narrowed<T>::of(dhidden[k] * z);
      du[unit(k)] = Narrowed<T>::of(d[0][k]);
      du[H + unit(k)] = Narrowed<T>::of(d[1][k]);
      du[2 * H + unit(k)] = Narrowed<T>::of(candidate);
    }
  } else {
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if (valid(k)) d[0][k] = activation_vjp(s, S(widened(h[s.h_step + unit(k)])), dhidden[k]);
    }
  }
#pragma unroll
  for (int g = 0; g < G; g++) {
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if (!valid(k)) continue;
      const int i = g * H + unit(k);
      if (dn) dn[i] = Narrowed<T>::of(d[g][k]);
      if (CELL != GRU && s.place != SUM) du[i] = Narrowed<T>::of(d[g][k]);
      if (gain) d[g][k] *= widened(gain[i]);
    }
  }
  if (s.place != NOWHERE) normalize_row_vjp(d, hat, H, s.kind, s.partition, own);
#pragma unroll
  for (int g = 0; g < G; g++) {
#pragma unroll
    for (int k = 0; k < UNITS; k++) {
      if (!valid(k)) continue;
      const int i = g * H + unit(k);
      if (CELL != GRU && s.place == SUM) du[i] = Narrowed<T>::of(d[g][k]);
      da[i] = Narrowed<T>::of(d[g][k]);
    }
  }
}

// -- batch normalization: a block has 8 hidden units and all rows -----------------------------------------------------------------------------

const int UNITS_OF_BLOCK = 8, LANES = 32;  // blocks are (8, 32); a thread has every 32nd row of one unit

// N numbers of each unit, combined over the threads that share it.
template <class S, int N, class Combine> __device__ inline void over_batch(S (&v)[N], Combine combine) {
  __shared__ S room[N][LANES / 4][UNITS_OF_BLOCK];
  for (int offset = 8; offset < 32; offset *= 2) {
#pragma unroll
    for (int k = 0; k < N; k++) v[k] = combine(v[k], __shfl_xor_sync(0xffffffffu, v[k], offset));
  }
  __syncthreads();
  if (threadIdx.y % 4 == 0) {
#pragma unroll
    for (int k = 0; k < N; k++) room[k][threadIdx.y / 4][threadIdx.x] = v[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; k++) {
    S total = room[k][0][threadIdx.x];
    for (int w = 1; w < LANES / 4; w++) total = combine(total, room[k][w][threadIdx.x]);
    v[k] = total;
  }
}

// Statistics of N features over the rows that are active; `value(b, k)` reads one.
template <int N, class S, class Value, class Active>
__device__ inline void batch_statistics(
    const Step& s, Value value, Active active, S count, RowStatistics<S> (&found)[N], S (&variance)[N]) {
  S sums[N], lost[N], scale[N], first[N], mean[N], rest[N];
#pragma unroll
  for (int k = 0; k < N; k++) {
    sums[k] = lost[k] = mean[k] = rest[k] = 0;
    first[k] = active(0) ? value(0, k) : S(0);
  }
  for (Count b = threadIdx.y; b < s.batch; b += LANES) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      if (active(b)) sums[k] = larger(sums[k], magnitude(value(b, k)));
    }
  }
  over_batch(sums, Larger());
#pragma unroll
  for (int k = 0; k < N; k++) {
    scale[k] = row_scale(sums[k], s.eps);
    first[k] *= scale[k];
    sums[k] = 0;
  }
  for (Count b = threadIdx.y; b < s.batch; b += LANES) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      if (active(b)) carry(sums[k], lost[k], value(b, k) * scale[k] - first[k]);
    }
  }
  over_batch(sums, Added());
#pragma unroll
  for (int k = 0; k < N; k++) {
    mean[k] = first[k] + sums[k] / count;
    sums[k] = lost[k] = 0;
  }
  for (Count b = threadIdx.y; b < s.batch; b += LANES) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      if (active(b)) carry(sums[k], lost[k], value(b, k) * scale[k] - mean[k]);
    }
  }
  over_batch(sums, Added());
#pragma unroll
  for (int k = 0; k < N; k++) {
    rest[k] = sums[k] / count;
    sums[k] = lost[k] = 0;
  }
  for (Count b = threadIdx.y; b < s.batch; b += LANES) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      const S z = (value(b, k) * scale[k] - mean[k]) - rest[k];
      if (active(b)) carry(sums[k], lost[k], z * z);
    }
  }
  over_batch(sums, Added());
#pragma unroll
  for (int k = 0; k < N; k++) {
    variance[k] = sums[k] / count;
    found[k] = found_statistics(mean[k], rest[k], variance[k], S(s.eps), scale[k]);
  }
}

// The statistics of N features, `width` apart in an array: given, or the batch's own, which are kept and given out.
template <class T, int N, class S, class Value, class Active>
__device__ inline void statistics_of_step(
    const Step& s, Count t, Count hidden, Count j, bool inside, const void* mean, const void* variance, void* seen_mean, void* seen_variance,
    void* kept, Value value, Active active, S count, RowStatistics<S> (&found)[N]) {
  if (s.training) {
    S spread[N];
    batch_statistics<N>(s, value, active, count > 0 ? count : S(1), found, spread);
    if (inside && threadIdx.y == 0) {
#pragma unroll
      for (int k = 0; k < N; k++) {
        const S scale = found[k].scale, factor = s.unbiased && count > 1 ? count / (count - 1) : S(1);
        out<S>(seen_mean)[t * N * hidden + k * hidden + j] = (found[k].mean + found[k].rest) / scale;
        out<S>(seen_variance)[t * N * hidden + k * hidden + j] = spread[k] / scale / scale * factor;
      }
    }
  } else if (inside) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      const Count i = t * N * hidden + k * hidden + j;
      found[k] = {in<S>(mean)[i], S(0), S(1) / root(in<S>(variance)[i] + S(s.eps)), S(1)};
    }
  }
  if (inside && kept && threadIdx.y == 0) {
#pragma unroll
    for (int k = 0; k < N; k++) out<RowStatistics<S>>(kept)[t * N * hidden + k * hidden + j] = found[k];
  }
}

template <class T, int CELL> __global__ void __launch_bounds__(256) batch_forward(const Step s, Count t) {
  typedef typename StatisticsOf<T>::type S;
  const int G = GatesOf<CELL>::count;
  const Count H = s.hidden, B = s.batch, j = (Count)blockIdx.x * UNITS_OF_BLOCK + threadIdx.x, wide = G * H;
  const bool inside = j < H;
  const Count column = inside ? j : 0;
  const T *u = in<T>(s.u) + t * B * wide + column, *early = in<T>(s.early);
  T *a = out<T>(s.a) + t * s.a_step + column, *gates = out<T>(s.gates) + t * s.a_step + column;
  T *h = out<T>(s.h) + t * s.h_step + column, *c = CELL == LSTM ? out<T>(s.c) + t * s.c_step + column : nullptr;
  T* y = s.y ? out<T>(s.y) + t * B * H + column : nullptr;
  const auto active = [&](Count b) { return !s.lengths || t < s.lengths[b]; };
  S count[1] = {0};
  for (Count b = threadIdx.y; b < B; b += LANES) count[0] += active(b) ? 1 : 0;
  over_batch(count, Added());
  if (inside && (early || s.place == SUM)) {
    for (Count b = threadIdx.y; b < B; b += LANES) {
#pragma unroll
      for (int g = 0; g < G; g++) {
        S x = widened(a[b * wide + g * H]);
        if (early) x += widened(early[g * H + j]);
        if (s.place == SUM) x += widened(u[b * wide + g * H]);
        a[b * wide + g * H] = Narrowed<T>::of(x);
      }
    }
  }
  __syncthreads();
  RowStatistics<S> own[G] = {}, cell_own[1] = {};
  if (s.place != NOWHERE) {
    const auto hidden_term = [&](Count b, int g) { return S(widened(a[b * wide + g * H])); };
    statistics_of_step<T, G>(
        s, t, H, j, inside, s.mean, s.variance, s.seen_mean, s.seen_variance, s.statistics, hidden_term, active, count[0], own);
  }
  for (Count b = threadIdx.y; inside && b < B; b += LANES) {
    const Count at = b * H;
    if (!active(b)) {
      h[s.h_step + at] = h[at];
      if (CELL == LSTM) c[s.c_step + at] = c[at];
      if (y) y[at] = Narrowed<T>::of(S(0));
      continue;
    }
    S value[G];
#pragma unroll
    for (int g = 0; g < G; g++) {
      value[g] = widened(a[b * wide + g * H]);
      if (s.place != NOWHERE) value[g] = normalized(value[g], own[g]);
      value[g] = affine(value[g], in<T>(s.gain), in<T>(s.shift), g * H + j);
      if (s.place != SUM && !(CELL == GRU && g == 2)) value[g] += widened(u[b * wide + g * H]);
    }
    S after = 0;
    if constexpr (CELL == LSTM) {
      const S i = sigmoid(value[0]), f = sigmoid(value[1]), g = tangent(value[2]), o = sigmoid(value[3]);
      c[s.c_step + at] = Narrowed<T>::of(f * widened(c[at]) + i * g);
      gates[b * wide] = Narrowed<T>::of(i);
      gates[b * wide + H] = Narrowed<T>::of(f);
      gates[b * wide + 2 * H] = Narrowed<T>::of(g);
      gates[b * wide + 3 * H] = Narrowed<T>::of(o);
      continue;
    } else if constexpr (CELL == GRU) {
      const S r = sigmoid(value[0]), z = sigmoid(value[1]), n = activation(s, S(widened(u[b * wide + 2 * H])) + r * value[2]);
      after = n + z * (widened(h[at]) - n);
      gates[b * wide] = Narrowed<T>::of(r);
      gates[b * wide + H] = Narrowed<T>::of(z);
      gates[b * wide + 2 * H] = Narrowed<T>::of(n);
    } else {
      after = activation(s, value[0]);
    }
    h[s.h_step + at] = Narrowed<T>::of(after);
    if (y) y[at] = Narrowed<T>::of(after);
  }
  if constexpr (CELL == LSTM) {
    __syncthreads();
    if (s.state != AS_IT_IS) {
      const auto state = [&](Count b, int) { return S(widened(c[s.c_step + b * H])); };
      statistics_of_step<T, 1>(
          s, t, H, j, inside, s.cell_mean, s.cell_variance, s.seen_cell_mean, s.seen_cell_variance, s.cell_statistics, state, active,
          count[0], cell_own);
    }
    for (Count b = threadIdx.y; inside && b < B; b += LANES) {
      if (!active(b)) continue;
      S state = widened(c[s.c_step + b * H]);
      if (s.state != AS_IT_IS) state = affine(normalized(state, cell_own[0]), in<T>(s.cell_gain), in<T>(s.cell_shift), j);
      const T after = Narrowed<T>::of(S(widened(gates[b * wide + 3 * H])) * tangent(state));
      h[s.h_step + b * H] = after;
      if (y) y[b * H] = after;
    }
  }
}

template <class T, int CELL> __global__ void __launch_bounds__(256) batch_backward(const Step s, Count t) {
  typedef typename StatisticsOf<T>::type S;
  const int G = GatesOf<CELL>::count;
  const Count H = s.hidden, B = s.batch, j = (Count)blockIdx.x * UNITS_OF_BLOCK + threadIdx.x, wide = G * H;
  const bool inside = j < H;
  const Count column = inside ? j : 0, from = t * B * wide + column;
  const T *a = in<T>(s.a) + from, *gates = in<T>(s.gates) + from, *h = in<T>(s.h) + t * s.h_step + column;
  const T *c = CELL == LSTM ? in<T>(s.c) + t * s.c_step + column : nullptr;
  T *du = out<T>(s.du) + from, *da = out<T>(s.da) + from, *dn = out<T>(s.dn) + from;
  T *direct = out<T>(s.direct) + column, *dc = CELL == LSTM ? out<T>(s.dc) + column : nullptr;
  const T *dh = in<T>(s.dh) + column, *dy = s.dy ? in<T>(s.dy) + t * B * H + column : nullptr;
  const T *gain = in<T>(s.gain), *shift = in<T>(s.shift), *cell_gain = in<T>(s.cell_gain);
  const auto active = [&](Count b) { return !s.lengths || t < s.lengths[b]; };
  S count[1] = {0};
  for (Count b = threadIdx.y; b < B; b += LANES) count[0] += active(b) ? 1 : 0;
  over_batch(count, Added());
  const S n = count[0] > 0 ? count[0] : S(1);
  const auto dhidden = [&](Count b) {
    S d = widened(dh[b * H]) + widened(direct[b * H]);
    if (dy) d += widened(dy[b * H]);
    return d;
  };
  RowStatistics<S> own[G], cell_own = {0, 0, 0, 1};
#pragma unroll
  for (int g = 0; g < G; g++) {
    own[g] = {0, 0, 0, 1};
    if (s.place != NOWHERE) own[g] = in<RowStatistics<S>>(s.statistics)[t * wide + g * H + column];
  }
  S both[2] = {0, 0}, both_lost[2] = {0, 0};
  if (CELL == LSTM && s.state != AS_IT_IS) {
    cell_own = in<RowStatistics<S>>(s.cell_statistics)[t * H + column];
    for (Count b = threadIdx.y; b < B; b += LANES) {
      if (!active(b)) continue;
      const S hat = normalized(S(widened(c[s.c_step + b * H])), cell_own);
      const S tanh_c = tangent(affine(hat, cell_gain, in<T>(s.cell_shift), column)), o = widened(gates[b * wide + 3 * H]);
      const S d = dhidden(b) * o * (1 - tanh_c * tanh_c);
      carry(both[0], both_lost[0], d * hat);
      carry(both[1], both_lost[1], d);
    }
    over_batch(both, Added());
    if (inside && threadIdx.y == 0) {
      s.cell_sums[t * 2 * H + j] = (double)both[0];
      s.cell_sums[(t * 2 + 1) * H + j] = (double)both[1];
    }
  }
  S with[G], all[G], with_lost[G], all_lost[G];
#pragma unroll
  for (int g = 0; g < G; g++) with[g] = all[g] = with_lost[g] = all_lost[g] = 0;
  for (Count b = threadIdx.y; b < B; b += LANES) {
    const Count at = b * H;
    S d[G], hat[G];
    if (!active(b)) {
      if (!inside) continue;
      const T zero = Narrowed<T>::of(S(0));
      direct[at] = Narrowed<T>::of(S(widened(direct[at]) + widened(dh[at])));
#pragma unroll
      for (int g = 0; g < G; g++) du[b * wide + g * H] = dn[b * wide + g * H] = da[b * wide + g * H] = zero;
      continue;
    }
    const S given = dhidden(b);
    S straight = 0, carried = 0, candidate = 0;
#pragma unroll
    for (int g = 0; g < G; g++) {
      hat[g] = widened(a[b * wide + g * H]);
      if (s.place != NOWHERE) hat[g] = normalized(hat[g], own[g]);
    }
    if constexpr (CELL == LSTM) {
      S state = widened(c[s.c_step + at]), cell_hat = 0;
      if (s.state != AS_IT_IS) {
        cell_hat = normalized(state, cell_own);
        state = affine(cell_hat, cell_gain, in<T>(s.cell_shift), column);
      }
      const S i = widened(gates[b * wide]), f = widened(gates[b * wide + H]), g = widened(gates[b * wide + 2 * H]);
      const S o = widened(gates[b * wide + 3 * H]), tanh_c = tangent(state);
      S dcell = given * o * (1 - tanh_c * tanh_c);
      if (s.state != AS_IT_IS) {
        if (s.training) dcell = (dcell - both[1] / n) - cell_hat * (both[0] / n);
        if (cell_gain) dcell *= widened(cell_gain[column]);
        dcell *= cell_own.rstd;
        dcell *= cell_own.scale;
      }
      const S total = dcell + widened(dc[at]);
      d[0] = total * g * i * (1 - i);
      d[1] = total * widened(c[at]) * f * (1 - f);
      d[2] = total * i * (1 - g * g);
      d[3] = given * tanh_c * o * (1 - o);
      carried = total * f;
    } else if constexpr (CELL == GRU) {
      const S r = widened(gates[b * wide]), z = widened(gates[b * wide + H]), m = widened(gates[b * wide + 2 * H]);
      const S reset = affine(hat[2], gain, shift, 2 * H + column);
      candidate = activation_vjp(s, m, given * (1 - z));
      d[0] = candidate * reset * r * (1 - r);
      d[1] = given * (widened(h[at]) - m) * z * (1 - z);
      d[2] = candidate * r;
      straight = given * z;
    } else {
      d[0] = activation_vjp(s, S(widened(h[s.h_step + at])), given);
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
      const T rounded = Narrowed<T>::of(d[g]);
      carry(with[g], with_lost[g], widened(rounded) * hat[g]);
      carry(all[g], all_lost[g], S(widened(rounded)));
      if (!inside) continue;
      dn[b * wide + g * H] = rounded;
      if (s.place != SUM) du[b * wide + g * H] = CELL == GRU && g == 2 ? Narrowed<T>::of(candidate) : rounded;
    }
    if (inside) {
      direct[at] = Narrowed<T>::of(straight);
      if (CELL == LSTM) dc[at] = Narrowed<T>::of(carried);
    }
  }
  over_batch(with, Added());
  over_batch(all, Added());
  if (!inside) return;
  if (threadIdx.y == 0) {
#pragma unroll
    for (int g = 0; g < G; g++) {
      s.sums[t * 2 * wide + g * H + j] = (double)with[g];
      s.sums[(t * 2 + 1) * wide + g * H + j] = (double)all[g];
    }
  }
  for (Count b = threadIdx.y; b < B; b += LANES) {
    if (!active(b)) continue;
#pragma unroll
    for (int g = 0; g < G; g++) {
      S d = widened(dn[b * wide + g * H]);
      if (s.place != NOWHERE) {
        const S hat = normalized(S(widened(a[b * wide + g * H])), own[g]);
        if (s.training) d = (d - all[g] / n) - hat * (with[g] / n);
      }
      if (gain) d *= widened(gain[g * H + j]);
      if (s.place != NOWHERE) d = d * own[g].rstd * own[g].scale;
      da[b * wide + g * H] = Narrowed<T>::of(d);
      if (s.place == SUM) du[b * wide + g * H] = Narrowed<T>::of(d);
    }
  }
}
