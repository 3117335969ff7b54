// What all kernels share: types of values and of statistics, packs of 16 bytes, sums over the threads of a row.
//
// Values are float, double, __half or __nv_bfloat16; statistics are float for the narrow types. Nothing here adds with atomics: the same
// input gives the same bits.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef long long Count;

template <class T> struct StatisticsOf { typedef float type; };
template <> struct StatisticsOf<double> { typedef double type; };

__device__ inline float widened(float x) { return x; }
__device__ inline double widened(double x) { return x; }
__device__ inline float widened(__half x) { return __half2float(x); }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> struct Narrowed;
template <> struct Narrowed<float> { static __device__ float of(float x) { return x; } static __device__ float of(double x) { return (float)x; } };
template <> struct Narrowed<double> { static __device__ double of(double x) { return x; } };
template <> struct Narrowed<__half> { static __device__ __half of(float x) { return __float2half_rn(x); } };
template <> struct Narrowed<__nv_bfloat16> { static __device__ __nv_bfloat16 of(float x) { return __float2bfloat16_rn(x); } };

// V values that one instruction reads or writes.
template <class T, int V> struct alignas(sizeof(T) * V) Pack { T values[V]; };

template <int V, class T, class S> __device__ inline void load(const T* from, S (&to)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int v = 0; v < V; v++) to[v] = widened(pack.values[v]);
}

template <int V, class T, class S> __device__ inline void store(T* to, const S (&from)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; v++) pack.values[v] = Narrowed<T>::of(from[v]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline double magnitude(double x) { return fabs(x); }
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }
__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }

// Rows whose squares would leave the type are multiplied by a power of two: the table of portnorm/norm/normalize.py.
__device__ inline float row_scale(float largest, double eps) {
  if (largest > 0x1p50f) return 0x1p-80f;
  return eps < 0x1p-75 && largest < 0x1p-50f && largest > 0 ? 0x1p100f : 1.0f;
}
__device__ inline double row_scale(double largest, double eps) {
  if (largest > 0x1p450) return 0x1p-600;
  return eps < 0x1p-845 && largest < 0x1p-450 && largest > 0 ? 0x1p600 : 1.0;
}

// Statistics of a row as the backward pass reads them: x̂ = ((x · scale − mean) − rest) · rstd.
template <class S> struct RowStatistics { S mean, rest, rstd, scale; };

// A row without spread needs no scale, under which eps would vanish: it keeps 1 / sqrt(eps) for its gradient.
template <class S> __device__ inline RowStatistics<S> found_statistics(S mean, S rest, S variance, S eps, S scale) {
  if (variance == 0) {
    mean /= scale;
    rest /= scale;
    scale = 1;
  }
  return {mean, rest, S(1) / root(variance + eps * scale * scale), scale};
}

template <class S> __device__ inline S normalized(S x, const RowStatistics<S>& s) { return ((x * s.scale - s.mean) - s.rest) * s.rstd; }

struct Added { template <class S> __device__ S operator()(S a, S b) const { return a + b; } };
struct Larger { template <class S> __device__ S operator()(S a, S b) const { return larger(a, b); } };

// N numbers combined over the threads of a row, which are the blockDim.x threads along x: a power of two up to 32, so that a warp holds
// whole rows, or a multiple of 32 in a block with one row. Every thread gets the results; all threads of the block take part.
template <class S, int N, class Combine> __device__ inline void over_row(S (&v)[N], Combine combine) {
  const int width = blockDim.x < 32 ? blockDim.x : 32;
  for (int offset = width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < N; k++) v[k] = combine(v[k], __shfl_xor_sync(0xffffffffu, v[k], offset));
  }
  if (blockDim.x <= 32) return;
  __shared__ S of_warps[N][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  __syncthreads();
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < N; k++) of_warps[k][warp] = v[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; k++) {
    S total = of_warps[k][0];
    for (int w = 1; w < warps; w++) total = combine(total, of_warps[k][w]);
    v[k] = total;
  }
}

template <class S> __device__ inline S sum_over_row(S value) {
  S v[1] = {value};
  over_row(v, Added());
  return v[0];
}

// Whether a condition holds for any row that shares the branch with this thread's own.
__device__ inline bool any_row(bool condition) { return blockDim.x > 32 ? condition : __any_sync(0xffffffffu, condition) != 0; }

// One more term, with what rounding loses of the sum carried along (Kahan 1965): like terms all round in the same direction, so that a sum
// of many would be off. What is not finite stays what it is.
template <class S> __device__ inline void carry(S& total, S& lost, S value) {
  const S term = value - lost, more = total + term, rest = (more - total) - term;
  lost = rest == rest ? rest : S(0);
  total = more;
}

// A long sum: parts of 32 values in the type of the values, and the sum of the parts in float64.
template <class S> struct LongSum {
  double total = 0.0, lost = 0.0;
  S part = 0;
  int count = 0;
  __device__ void add(S value) {
    part += value;
    if (++count == 32) flush();
  }
  __device__ void flush() {
    carry(total, lost, (double)part);
    part = 0;
    count = 0;
  }
};

// Where gain and shift of value i of a row lie: row r takes row r mod `period`, each value of it for `wide` neighbours.
struct Layout {
  Count period;
  Count wide;
  Count length;  // of a row
  __device__ Count start(Count row) const { return (row % period) * (length / wide); }
};
