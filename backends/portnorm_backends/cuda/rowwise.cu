// Normalization of contiguous rows of n values that fit into registers: one read and one write.
//
//     m = x0 + Σ (x − x0) / n,  d = Σ (x − m) / n,  σ² = Σ ((x − m) − d)² / n,  x̂ = ((x − m) − d) / sqrt(σ² + ε),  y = x̂ · weight + bias
//
//     dx = rstd · (g − Σ g / n − x̂ · Σ g x̂ / n)  with g = dy · weight;   dweight = Σ dy · x̂,  dbias = Σ dy  over the rows
//
// Reference: portnorm/norm/normalize.py. RMS normalization has m = d = 0 and no Σ g. A row belongs to the blockDim.x threads along x of a
// block; each has PER values of it, in packs of V. Layer, group and instance normalization differ in where weight and bias lie (`Layout`).

#include "common.cuh"

template <class T, class P, int V, int PER>
__global__ void __launch_bounds__(512) rows_forward(
    const T* x, const P* weight, const P* bias, T* y, void* statistics, void* means, void* variances, Count rows, Count period, Count wide,
    Count length, double eps, bool center) {
  typedef typename StatisticsOf<T>::type S;
  const Layout layout = {period, wide, length};
  const int n = (int)length, stride = blockDim.x * V;
  const Count row = (Count)blockIdx.x * blockDim.y + threadIdx.y;
  const bool inside = row < rows;
  const T* from = x + (inside ? row : 0) * length;
  S value[PER / V][V];
  S first = widened(from[0]), both[1] = {0}, largest[1] = {0};
#pragma unroll
  for (int k = 0; k < PER / V; k++) {
    const int i = k * stride + (int)threadIdx.x * V;
    if (i < n) load<V>(from + i, value[k]);
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (i >= n) value[k][v] = 0;
      else {
        both[0] += value[k][v] - first;
        largest[0] = larger(largest[0], magnitude(value[k][v]));
      }
    }
  }
  over_row(largest, Larger());
  const S scale = row_scale(largest[0], eps);
  if (any_row(scale != 1)) {
    both[0] = 0;
    first *= scale;
#pragma unroll
    for (int k = 0; k < PER / V; k++) {
#pragma unroll
      for (int v = 0; v < V; v++) {
        value[k][v] *= scale;
        if (k * stride + (int)threadIdx.x * V < n) both[0] += value[k][v] - first;
      }
    }
  }
  S mean = 0, rest = 0;
  if (center) {
    mean = first + sum_over_row(both[0]) / n;
    S total = 0;
#pragma unroll
    for (int k = 0; k < PER / V; k++) {
#pragma unroll
      for (int v = 0; v < V; v++) {
        if (k * stride + (int)threadIdx.x * V < n) {
          value[k][v] -= mean;
          total += value[k][v];
        }
      }
    }
    rest = sum_over_row(total) / n;
  }
  S squares = 0;
#pragma unroll
  for (int k = 0; k < PER / V; k++) {
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (k * stride + (int)threadIdx.x * V < n) {
        value[k][v] -= rest;
        squares += value[k][v] * value[k][v];
      }
    }
  }
  const S variance = sum_over_row(squares) / n;
  const RowStatistics<S> found = found_statistics(mean, rest, variance, S(eps), scale);
  if (!inside) return;
  const Count start = layout.start(row);
#pragma unroll
  for (int k = 0; k < PER / V; k++) {
    const int i = k * stride + (int)threadIdx.x * V;
    if (i >= n) continue;
#pragma unroll
    for (int v = 0; v < V; v++) value[k][v] *= found.rstd;
    if (wide == 1) {
      S own[V];
      if (weight) {
        load<V>(weight + start + i, own);
#pragma unroll
        for (int v = 0; v < V; v++) value[k][v] *= own[v];
      }
      if (bias) {
        load<V>(bias + start + i, own);
#pragma unroll
        for (int v = 0; v < V; v++) value[k][v] += own[v];
      }
    } else {
      const bool together = wide % V == 0;
      int at = i / (int)wide;
#pragma unroll
      for (int v = 0; v < V; v++) {
        if (v > 0 && !together) at = (i + v) / (int)wide;
        if (weight) value[k][v] *= widened(weight[start + at]);
        if (bias) value[k][v] += widened(bias[start + at]);
      }
    }
    store<V>(y + row * length + i, value[k]);
  }
  if (threadIdx.x != 0) return;
  static_cast<RowStatistics<S>*>(statistics)[row] = found;
  if (means) {
    static_cast<S*>(means)[row] = (found.mean + found.rest) / found.scale;
    static_cast<S*>(variances)[row] = variance / found.scale / found.scale;
  }
}

// With `sums`, every block adds dy · x̂ and dy of its rows, value by value, into its own row of parts (blocks, 2, n).
template <class T, class P, int V, int PER, bool SUMS>
__global__ void __launch_bounds__(512) rows_backward(
    const T* x, const T* dy, const P* weight, const void* statistics, T* dx, double* parts, Count rows, Count period, Count wide,
    Count length, bool center) {
  typedef typename StatisticsOf<T>::type S;
  const Layout layout = {period, wide, length};
  const int n = (int)length, stride = blockDim.x * V;
  S dweight[SUMS ? PER / V : 1][V], dbias[SUMS ? PER / V : 1][V];
  if (SUMS) {
#pragma unroll
    for (int k = 0; k < PER / V; k++) {
#pragma unroll
      for (int v = 0; v < V; v++) dweight[k][v] = dbias[k][v] = 0;
    }
  }
  for (Count top = (Count)blockIdx.x * blockDim.y; top < rows; top += (Count)gridDim.x * blockDim.y) {
    const Count row = top + threadIdx.y;
    const bool inside = row < rows;
    const Count from = (inside ? row : 0) * length, start = layout.start(inside ? row : 0);
    const RowStatistics<S> own = static_cast<const RowStatistics<S>*>(statistics)[inside ? row : 0];
    S hat[PER / V][V], g[PER / V][V], sums[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < PER / V; k++) {
      const int i = k * stride + (int)threadIdx.x * V;
      if (i >= n) continue;
      load<V>(x + from + i, hat[k]);
      load<V>(dy + from + i, g[k]);
#pragma unroll
      for (int v = 0; v < V; v++) {
        hat[k][v] = normalized(hat[k][v], own);
        if (SUMS && inside) {
          dweight[k][v] += g[k][v] * hat[k][v];
          dbias[k][v] += g[k][v];
        }
      }
      if (weight && wide == 1) {
        S gain[V];
        load<V>(weight + start + i, gain);
#pragma unroll
        for (int v = 0; v < V; v++) g[k][v] *= gain[v];
      } else if (weight) {
        const bool together = wide % V == 0;
        int at = i / (int)wide;
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (v > 0 && !together) at = (i + v) / (int)wide;
          g[k][v] *= widened(weight[start + at]);
        }
      }
#pragma unroll
      for (int v = 0; v < V; v++) {
        sums[0] += g[k][v];
        sums[1] += g[k][v] * hat[k][v];
      }
    }
    over_row(sums, Added());
    const S a = center ? sums[0] / n : S(0), b = sums[1] / n;
    if (!inside) continue;
#pragma unroll
    for (int k = 0; k < PER / V; k++) {
      const int i = k * stride + (int)threadIdx.x * V;
      if (i >= n) continue;
#pragma unroll
      for (int v = 0; v < V; v++) g[k][v] = ((g[k][v] - a) - hat[k][v] * b) * own.rstd * own.scale;
      store<V>(dx + from + i, g[k]);
    }
  }
  if constexpr (SUMS) {
    // The rows of a block in pairs, where it has several: a power of two up to 128 / blockDim.x, so that half of them fit into 64 · PER.
    __shared__ S room[2 * 64 * PER];
    const int y = threadIdx.y;
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
      S* const of_pair = room + (y % half) * 2 * n;
#pragma unroll
      for (int k = 0; k < PER / V; k++) {
        const int i = k * stride + (int)threadIdx.x * V;
        if (i >= n || y < half || y >= 2 * half) continue;
#pragma unroll
        for (int v = 0; v < V; v++) {
          of_pair[i + v] = dweight[k][v];
          of_pair[n + i + v] = dbias[k][v];
        }
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < PER / V; k++) {
        const int i = k * stride + (int)threadIdx.x * V;
        if (i >= n || y >= half) continue;
#pragma unroll
        for (int v = 0; v < V; v++) {
          dweight[k][v] += of_pair[i + v];
          dbias[k][v] += of_pair[n + i + v];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < PER / V; k++) {
      const int i = k * stride + (int)threadIdx.x * V;
      if (i >= n || y > 0) continue;
#pragma unroll
      for (int v = 0; v < V; v++) {
        parts[((Count)blockIdx.x * 2) * n + i + v] = (double)dweight[k][v];
        parts[((Count)blockIdx.x * 2 + 1) * n + i + v] = (double)dbias[k][v];
      }
    }
  }
}

// Σ dy · x̂ and Σ dy of every run of `wide` neighbours, which share gain and shift: parts (rows / period, 2, period · length / wide).
template <class T>
__global__ void __launch_bounds__(256) run_sums(
    const T* x, const T* dy, const void* statistics, double* parts, Count rows, Count period, Count wide, Count length) {
  typedef typename StatisticsOf<T>::type S;
  const Count per_row = length / wide, run = (Count)blockIdx.x * blockDim.y + threadIdx.y;
  const bool inside = run < rows * per_row;
  const Count row = inside ? run / per_row : 0, from = (inside ? run : 0) * wide;
  const RowStatistics<S> own = static_cast<const RowStatistics<S>*>(statistics)[row];
  LongSum<S> with, all;
  for (Count i = threadIdx.x; i < wide; i += blockDim.x) {
    const S g = widened(dy[from + i]);
    with.add(g * normalized((S)widened(x[from + i]), own));
    all.add(g);
  }
  with.flush();
  all.flush();
  double sums[2] = {with.total, all.total};
  over_row(sums, Added());
  if (inside && threadIdx.x == 0) {
    const Count at = row / period * 2 * period * per_row + row % period * per_row + run % per_row;
    parts[at] = sums[0];
    parts[at + period * per_row] = sums[1];
  }
}

// The same where every value has a gain of its own: the rows are (rows / period, period · length), each block adds some of them in its
// tile of 32 columns: parts (gridDim.y, 2, period · length). Blocks are (32, 8).
template <class T>
__global__ void __launch_bounds__(256) column_sums(
    const T* x, const T* dy, const void* statistics, double* parts, Count rows, Count period, Count length, Count per_block) {
  typedef typename StatisticsOf<T>::type S;
  const Count width = period * length, column = (Count)blockIdx.x * 32 + threadIdx.x, count = rows / period;
  const Count end = (blockIdx.y + 1) * per_block < count ? (blockIdx.y + 1) * per_block : count;
  LongSum<S> with, all;
  if (column < width) {
    const Count of_row = column / length;
    for (Count t = blockIdx.y * per_block + threadIdx.y; t < end; t += blockDim.y) {
      const S g = widened(dy[t * width + column]);
      const RowStatistics<S> own = static_cast<const RowStatistics<S>*>(statistics)[t * period + of_row];
      with.add(g * normalized((S)widened(x[t * width + column]), own));
      all.add(g);
    }
    with.flush();
    all.flush();
  }
  __shared__ double room[2][8][32];
  room[0][threadIdx.y][threadIdx.x] = with.total;
  room[1][threadIdx.y][threadIdx.x] = all.total;
  __syncthreads();
  if (threadIdx.y < 2 && column < width) {
    double total = 0.0;
    for (int k = 0; k < 8; k++) total += room[threadIdx.y][k][threadIdx.x];
    parts[((Count)blockIdx.y * 2 + threadIdx.y) * width + column] = total;
  }
}

// Sums of parts (count, 2, width) over the first axis, `per_block` of them by a block: into parts again (gridDim.y, 2, width), or into
// `first` and `second` of the type of the parameters, each where it is wanted. Blocks are (32, 8).
template <class O>
__global__ void __launch_bounds__(256) sum_parts(
    const double* parts, double* next, O* first, O* second, Count count, Count width, Count per_block) {
  const Count column = (Count)blockIdx.x * 32 + threadIdx.x;
  const Count end = (blockIdx.y + 1) * per_block < count ? (blockIdx.y + 1) * per_block : count;
  double total = 0.0;
  if (column < 2 * width) {
    for (Count k = blockIdx.y * per_block + threadIdx.y; k < end; k += blockDim.y) total += parts[k * 2 * width + column];
  }
  __shared__ double room[8][32];
  room[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= 2 * width) return;
  total = 0.0;
  for (int k = 0; k < 8; k++) total += room[k][threadIdx.x];
  if (next) next[(Count)blockIdx.y * 2 * width + column] = total;
  else {
    O* to = column < width ? first : second;
    if (to) to[column < width ? column : column - width] = Narrowed<O>::of((typename StatisticsOf<O>::type)total);
  }
}
