// Normalization over all axes but the channels, as batch normalization in training does it, and of rows too long for registers.
//
//     x̂ = ((x − m) − d) · rstd,   y = x̂ · weight + bias,   dx = rstd · (g − Σ g / n − x̂ · Σ g x̂ / n)  with g = dy · weight
//
// Reference: portnorm/norm/normalize.py. `channel_…`: (outer, channels, inner), every (outer, channel) a contiguous block; a long row is a
// channel with outer = 1. `column_…`: (rows, channels). A channel is shared out to `splits` blocks, so that statistics are one read: a
// thread takes 16 values at a time with their own mean and squares in two re-centred passes in registers, and these are merged without any
// difference of squares (Chan, Golub & LeVeque 1983), in float64, which leaves (m, d) as the two halves of one mean. For values narrower than
// float64.

#include "common.cuh"

struct Moments {
  double count, mean, squares, largest;
  __device__ void merge(double other_count, double other_mean, double other_squares, double other_largest) {
    if (other_count == 0) return;
    const double all = count + other_count, apart = other_mean - mean;
    mean += apart * (other_count / all);
    squares += other_squares + apart * apart * (count * other_count / all);
    count = all;
    largest = larger(largest, other_largest);
  }
  __device__ void merge(const Moments& o) { merge(o.count, o.mean, o.squares, o.largest); }
};

// Count, mean and squares of up to N values.
template <int N> __device__ inline void add_values(Moments& moments, float (&value)[N], int count, bool center) {
  if (count == 0) return;
  float largest = 0;
#pragma unroll
  for (int k = 0; k < N; k++) {
    if (k < count) largest = larger(largest, magnitude(value[k]));
  }
  float scale = 1;
  if (largest > 0x1p50f || (largest < 0x1p-50f && largest > 0)) {
    scale = row_scale(largest, 0.0);
#pragma unroll
    for (int k = 0; k < N; k++) value[k] *= scale;
  }
  float mean = 0, rest = 0, squares = 0;
  if (center) {
    const float first = value[0];
    float total = 0;
#pragma unroll
    for (int k = 0; k < N; k++) {
      if (k < count) total += value[k] - first;
    }
    mean = first + total / count;
    total = 0;
#pragma unroll
    for (int k = 0; k < N; k++) {
      if (k < count) total += value[k] - mean;
    }
    rest = total / count;
  }
#pragma unroll
  for (int k = 0; k < N; k++) {
    const float z = (value[k] - mean) - rest;
    if (k < count) squares += z * z;
  }
  const double back = 1.0 / (double)scale;
  moments.merge(count, ((double)mean + (double)rest) * back, (double)squares * back * back, (double)largest);
}

// -- (outer, channels, inner) ------------------------------------------------------------------------------------------------------------

struct Channel {
  Count channels, outer, inner;
  __device__ Count count() const { return outer * inner; }
  __device__ Count at(Count channel, Count i) const {
    if (outer == 1) return channel * inner + i;
    const unsigned int block = (unsigned int)i / (unsigned int)inner;
    return ((Count)block * channels + channel) * inner + (i - (Count)block * inner);
  }
};

// The part of a channel that a block has: from `start` to before `end`, both multiples of V.
struct Part {
  Count channel, start, end;
  template <int V> static __device__ Part of(const Channel& c, Count splits) {
    const Count channel = blockIdx.x / splits, split = blockIdx.x % splits;
    const Count length = ((c.count() + splits - 1) / splits + V - 1) / V * V, start = split * length, end = start + length;
    return {channel, start, end < c.count() ? end : c.count()};
  }
};

template <class T, int V>
__global__ void __launch_bounds__(256) channel_moments(const T* x, void* parts, Count channels, Count outer, Count inner, Count splits, bool center) {
  const Channel c = {channels, outer, inner};
  const Part part = Part::of<V>(c, splits);
  Moments own = {0, 0, 0, 0};
  const int step = 256 * V;
  for (Count top = part.start + (int)threadIdx.x * V; top < part.end; top += step * (16 / V)) {
    float value[16];
    int count = 0;
#pragma unroll
    for (int k = 0; k < 16 / V; k++) {
      const Count i = top + k * step;
      if (i >= part.end) {
#pragma unroll
        for (int v = 0; v < V; v++) value[k * V + v] = 0;
        continue;
      }
      float pack[V];
      load<V>(x + c.at(part.channel, i), pack);
#pragma unroll
      for (int v = 0; v < V; v++) value[k * V + v] = pack[v];
      count += V;
    }
    add_values(own, value, count, center);
  }
  __shared__ Moments room[256];
  room[threadIdx.x] = own;
  __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    if ((int)threadIdx.x < half) room[threadIdx.x].merge(room[threadIdx.x + half]);
    __syncthreads();
  }
  if (threadIdx.x == 0) static_cast<Moments*>(parts)[blockIdx.x] = room[0];
}

// Statistics of each channel from its parts (channels, splits); one block of 128 threads for each.
__global__ void __launch_bounds__(128) merge_moments(const void* parts, void* statistics, float* mean, float* variance, Count splits, double eps) {
  __shared__ Moments room[128];
  Moments own = {0, 0, 0, 0};
  for (Count k = threadIdx.x; k < splits; k += 128) own.merge(static_cast<const Moments*>(parts)[(Count)blockIdx.x * splits + k]);
  room[threadIdx.x] = own;
  __syncthreads();
  for (int half = 64; half > 0; half /= 2) {
    if ((int)threadIdx.x < half) room[threadIdx.x].merge(room[threadIdx.x + half]);
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  own = room[0];
  const double scale = row_scale((float)own.largest, eps), scaled = own.mean * scale, spread = own.squares / own.count;
  const float near = (float)scaled;
  const float rstd = (float)(1.0 / sqrt(spread * scale * scale + eps * scale * scale));
  static_cast<RowStatistics<float>*>(statistics)[blockIdx.x] = {near, (float)(scaled - (double)near), rstd, (float)scale};
  if (mean) mean[blockIdx.x] = (float)own.mean;
  if (variance) variance[blockIdx.x] = (float)spread;
}

template <class T, class P, int V>
__global__ void __launch_bounds__(256) channel_write(
    const T* x, const P* weight, const P* bias, const void* statistics, T* y, Count channels, Count outer, Count inner, Count splits,
    Count period, Count wide) {
  const Channel c = {channels, outer, inner};
  const Part part = Part::of<V>(c, splits);
  const Layout layout = {period, wide, c.count()};
  const RowStatistics<float> own = static_cast<const RowStatistics<float>*>(statistics)[part.channel];
  const Count start = layout.start(part.channel);
  const bool one = wide == c.count();
  const float gain = one && weight ? widened(weight[start]) : 1.0f, shift = one && bias ? widened(bias[start]) : 0.0f;
#pragma unroll 4
  for (Count i = part.start + (int)threadIdx.x * V; i < part.end; i += 256 * V) {
    const Count at = c.at(part.channel, i);
    float value[V];
    load<V>(x + at, value);
#pragma unroll
    for (int v = 0; v < V; v++) {
      value[v] = normalized(value[v], own);
      if (one) value[v] = value[v] * gain + shift;
      else {
        const Count which = start + (wide == 1 ? i + v : (i + v) / wide);
        if (weight) value[v] *= widened(weight[which]);
        if (bias) value[v] += widened(bias[which]);
      }
    }
    store<V>(y + at, value);
  }
}

// Σ g and Σ g · x̂ of each part: sums (channels, splits, 2). Without a weight g is dy.
template <class T, class P, int V>
__global__ void __launch_bounds__(256) channel_sums(
    const T* x, const T* dy, const P* weight, const void* statistics, double* sums, Count channels, Count outer, Count inner, Count splits,
    Count period, Count wide) {
  const Channel c = {channels, outer, inner};
  const Part part = Part::of<V>(c, splits);
  const Layout layout = {period, wide, c.count()};
  const RowStatistics<float> own = static_cast<const RowStatistics<float>*>(statistics)[part.channel];
  const Count start = layout.start(part.channel);
  LongSum<float> all, with;
#pragma unroll 4
  for (Count i = part.start + (int)threadIdx.x * V; i < part.end; i += 256 * V) {
    const Count at = c.at(part.channel, i);
    float value[V], g[V];
    load<V>(x + at, value);
    load<V>(dy + at, g);
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (weight) g[v] *= widened(weight[start + (wide == 1 ? i + v : (i + v) / wide)]);
      all.add(g[v]);
      with.add(g[v] * normalized(value[v], own));
    }
  }
  all.flush();
  with.flush();
  double both[2] = {all.total, with.total};
  over_row(both, Added());
  if (threadIdx.x == 0) {
    sums[(Count)blockIdx.x * 2] = both[0];
    sums[(Count)blockIdx.x * 2 + 1] = both[1];
  }
}

// Sums (channels, splits, 2) over the splits: totals (channels, 2), and where wanted as the cotangents of shift and gain. One block of
// 128 threads for each channel.
template <class P>
__global__ void __launch_bounds__(128) merge_sums(const double* sums, double* totals, P* dweight, P* dbias, Count splits) {
  double both[2] = {0.0, 0.0};
  for (Count k = threadIdx.x; k < splits; k += 128) {
    both[0] += sums[((Count)blockIdx.x * splits + k) * 2];
    both[1] += sums[((Count)blockIdx.x * splits + k) * 2 + 1];
  }
  over_row(both, Added());
  if (threadIdx.x != 0) return;
  totals[(Count)blockIdx.x * 2] = both[0];
  totals[(Count)blockIdx.x * 2 + 1] = both[1];
  if (dbias) dbias[blockIdx.x] = Narrowed<P>::of((float)both[0]);
  if (dweight) dweight[blockIdx.x] = Narrowed<P>::of((float)both[1]);
}

// With `outside`, the totals are of dy, and the gain of the channel is multiplied with them too.
template <class T, class P, int V>
__global__ void __launch_bounds__(256) channel_dx(
    const T* x, const T* dy, const P* weight, const void* statistics, const double* totals, T* dx, Count channels, Count outer, Count inner,
    Count splits, Count period, Count wide, bool center, bool outside) {
  const Channel c = {channels, outer, inner};
  const Part part = Part::of<V>(c, splits);
  const Layout layout = {period, wide, c.count()};
  const RowStatistics<float> own = static_cast<const RowStatistics<float>*>(statistics)[part.channel];
  const Count start = layout.start(part.channel);
  const float a = center ? (float)(totals[part.channel * 2] / (double)c.count()) : 0.0f;
  const float b = (float)(totals[part.channel * 2 + 1] / (double)c.count());
  const float gain = outside && weight ? widened(weight[start]) : 1.0f;
#pragma unroll 4
  for (Count i = part.start + (int)threadIdx.x * V; i < part.end; i += 256 * V) {
    const Count at = c.at(part.channel, i);
    float value[V], g[V];
    load<V>(x + at, value);
    load<V>(dy + at, g);
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (weight && !outside) g[v] *= widened(weight[start + (wide == 1 ? i + v : (i + v) / wide)]);
      g[v] = ((g[v] - a) - normalized(value[v], own) * b) * gain * own.rstd * own.scale;
    }
    store<V>(dx + at, g);
  }
}

// -- (rows, channels) --------------------------------------------------------------------------------------------------------------------

// A block is (32, 8) threads, each with V channels; it has the rows from blockIdx.y · per_block on, a thread every eighth of them.
template <class T, int V>
__global__ void __launch_bounds__(256) column_moments(const T* x, void* parts, Count rows, Count channels, Count per_block, bool center) {
  const Count channel = ((Count)blockIdx.x * 32 + threadIdx.x) * V, start = blockIdx.y * per_block;
  const Count end = start + per_block < rows ? start + per_block : rows;
  Moments own[V];
#pragma unroll
  for (int v = 0; v < V; v++) own[v] = {0, 0, 0, 0};
  if (channel < channels) {
    for (Count top = start + threadIdx.y; top < end; top += 64) {
      float value[V][8];
      int count = 0;
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const Count row = top + k * 8;
        float pack[V];
        if (row < end) {
          load<V>(x + row * channels + channel, pack);
          count++;
        }
#pragma unroll
        for (int v = 0; v < V; v++) value[v][k] = row < end ? pack[v] : 0.0f;
      }
#pragma unroll
      for (int v = 0; v < V; v++) add_values(own[v], value[v], count, center);
    }
  }
  __shared__ Moments room[8][32];
#pragma unroll
  for (int v = 0; v < V; v++) {
    __syncthreads();
    room[threadIdx.y][threadIdx.x] = own[v];
    __syncthreads();
    if (threadIdx.y == 0 && channel < channels) {
      for (int k = 1; k < 8; k++) own[v].merge(room[k][threadIdx.x]);
      static_cast<Moments*>(parts)[(channel + v) * gridDim.y + blockIdx.y] = own[v];
    }
  }
}

template <class T, class P, int V>
__global__ void __launch_bounds__(256) column_write(
    const T* x, const P* weight, const P* bias, const void* statistics, T* y, Count rows, Count channels, Count per_block) {
  const Count channel = ((Count)blockIdx.x * 32 + threadIdx.x) * V, start = blockIdx.y * per_block;
  const Count end = start + per_block < rows ? start + per_block : rows;
  if (channel >= channels) return;
  RowStatistics<float> own[V];
  float gain[V], shift[V];
#pragma unroll
  for (int v = 0; v < V; v++) {
    own[v] = static_cast<const RowStatistics<float>*>(statistics)[channel + v];
    gain[v] = weight ? widened(weight[channel + v]) : 1.0f;
    shift[v] = bias ? widened(bias[channel + v]) : 0.0f;
  }
#pragma unroll 4
  for (Count row = start + threadIdx.y; row < end; row += 8) {
    float value[V];
    load<V>(x + row * channels + channel, value);
#pragma unroll
    for (int v = 0; v < V; v++) value[v] = normalized(value[v], own[v]) * gain[v] + shift[v];
    store<V>(y + row * channels + channel, value);
  }
}

// Σ dy and Σ dy · x̂ of each channel's part: sums (channels, gridDim.y, 2).
template <class T, int V>
__global__ void __launch_bounds__(256) column_gradients(
    const T* x, const T* dy, const void* statistics, double* sums, Count rows, Count channels, Count per_block) {
  const Count channel = ((Count)blockIdx.x * 32 + threadIdx.x) * V, start = blockIdx.y * per_block;
  const Count end = start + per_block < rows ? start + per_block : rows;
  LongSum<float> all[V], with[V];
  if (channel < channels) {
    RowStatistics<float> own[V];
#pragma unroll
    for (int v = 0; v < V; v++) own[v] = static_cast<const RowStatistics<float>*>(statistics)[channel + v];
#pragma unroll 4
    for (Count row = start + threadIdx.y; row < end; row += 8) {
      float value[V], g[V];
      load<V>(x + row * channels + channel, value);
      load<V>(dy + row * channels + channel, g);
#pragma unroll
      for (int v = 0; v < V; v++) {
        all[v].add(g[v]);
        with[v].add(g[v] * normalized(value[v], own[v]));
      }
    }
  }
  __shared__ double room[2][8][32];
#pragma unroll
  for (int v = 0; v < V; v++) {
    all[v].flush();
    with[v].flush();
    __syncthreads();
    room[0][threadIdx.y][threadIdx.x] = all[v].total;
    room[1][threadIdx.y][threadIdx.x] = with[v].total;
    __syncthreads();
    if (threadIdx.y < 2 && channel < channels) {
      double total = 0.0;
      for (int k = 0; k < 8; k++) total += room[threadIdx.y][k][threadIdx.x];
      sums[((channel + v) * gridDim.y + blockIdx.y) * 2 + threadIdx.y] = total;
    }
  }
}

template <class T, class P, int V>
__global__ void __launch_bounds__(256) column_dx(
    const T* x, const T* dy, const P* weight, const void* statistics, const double* totals, T* dx, Count rows, Count channels,
    Count per_block, bool center) {
  const Count channel = ((Count)blockIdx.x * 32 + threadIdx.x) * V, start = blockIdx.y * per_block;
  const Count end = start + per_block < rows ? start + per_block : rows;
  if (channel >= channels) return;
  RowStatistics<float> own[V];
  float gain[V], a[V], b[V];
#pragma unroll
  for (int v = 0; v < V; v++) {
    own[v] = static_cast<const RowStatistics<float>*>(statistics)[channel + v];
    gain[v] = weight ? widened(weight[channel + v]) : 1.0f;
    a[v] = center ? (float)(totals[(channel + v) * 2] / (double)rows) : 0.0f;
    b[v] = (float)(totals[(channel + v) * 2 + 1] / (double)rows);
  }
#pragma unroll 4
  for (Count row = start + threadIdx.y; row < end; row += 8) {
    float value[V], g[V];
    load<V>(x + row * channels + channel, value);
    load<V>(dy + row * channels + channel, g);
#pragma unroll
    for (int v = 0; v < V; v++) g[v] = ((g[v] - a[v]) - normalized(value[v], own[v]) * b[v]) * gain[v] * own[v].rstd * own[v].scale;
    store<V>(dx + row * channels + channel, g);
  }
}
