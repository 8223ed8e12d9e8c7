// INT8 linear layers on Hopper: quantization of activations by row, and the product with its scales.
// Compiled at run time for sm_90a, once for each set of macros:
//   quantize_rows   BF16, VECTORS, SMOOTHING
//   scaled_product  BF16, BN, BK, STAGES, CLUSTER, LAG, BY_CHANNEL, SCALE and BIAS (0: none, 1: float32,
//                   2: bfloat16, 3: float16), and WGMMA_*: the text of the instruction for BN columns
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 pack_halves(float low, float high) {
  u32 r;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}

#ifdef VECTORS
// Quantization: one row a block; VECTORS * 8 numbers a thread stay in registers (0: read twice).

__device__ __forceinline__ float to_float(u32 half) {
#if BF16
  return __uint_as_float(half << 16);
#else
  float r;
  asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(r) : "r"(half));
  return r;
#endif
}
// 1 / y, then x / y as IEEE rounds it (P. Markstein, IBM J. Res. Dev. 34(1), 1990), where nothing
// over- or underflows.
__device__ __forceinline__ float inverse_of(float y) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(y));
  return fmaf(r, fmaf(-y, r, 1.f), r);
}
__device__ __forceinline__ float divide(float x, float y, float inverse) {
  const float q = x * inverse;
  return fmaf(fmaf(-q, y, x), inverse, q);
}
__device__ __forceinline__ u32 pack_codes(const float* v) {
  u32 upper, r;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
      : "=r"(upper) : "r"(__float2int_rn(v[3])), "r"(__float2int_rn(v[2])), "r"(0));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
      : "=r"(r) : "r"(__float2int_rn(v[1])), "r"(__float2int_rn(v[0])), "r"(upper));
  return r;
}
__device__ __forceinline__ void load8(float* v, const unsigned short* x, const float* smoothing, int at) {
  const uint4 raw = *reinterpret_cast<const uint4*>(x + at);
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) v[2 * i] = to_float(words[i] & 0xffff), v[2 * i + 1] = to_float(words[i] >> 16);
#if SMOOTHING
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 f = *reinterpret_cast<const float4*>(smoothing + at + 4 * i);
    v[4 * i] = divide(v[4 * i], f.x, inverse_of(f.x));
    v[4 * i + 1] = divide(v[4 * i + 1], f.y, inverse_of(f.y));
    v[4 * i + 2] = divide(v[4 * i + 2], f.z, inverse_of(f.z));
    v[4 * i + 3] = divide(v[4 * i + 3], f.w, inverse_of(f.w));
  }
#endif
}
// As integers magnitudes keep their order, and a NaN is larger than everything.
__device__ __forceinline__ u32 largest(u32 bits, const float* v) {
#pragma unroll
  for (int i = 0; i < 8; ++i) bits = max(bits, __float_as_uint(v[i]) & 0x7fffffffu);
  return bits;
}
__device__ __forceinline__ void store8(signed char* codes, int at, const float* v, float scale,
                                       float inverse) {
  float q[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] = divide(v[i], scale, inverse);
  *reinterpret_cast<uint2*>(codes + at) = make_uint2(pack_codes(q), pack_codes(q + 4));
}

extern "C" __global__ void quantize_rows(const unsigned short* __restrict__ x,
                                         const float* __restrict__ smoothing, signed char* __restrict__ codes,
                                         float* __restrict__ scales, int K, long long row_stride) {
  __shared__ u32 of_warps[32];
  const int row = blockIdx.x, step = 8 * blockDim.x;
  x += row * row_stride;
  codes += (long long)row * K;
  u32 bits = 0;
#if VECTORS
  float v[VECTORS][8];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int at = 8 * threadIdx.x + i * step;
    if (at < K) load8(v[i], x, smoothing, at), bits = largest(bits, v[i]);
  }
#else
  float v[8];
  for (int at = 8 * threadIdx.x; at < K; at += step) load8(v, x, smoothing, at), bits = largest(bits, v);
#endif
  bits = __reduce_max_sync(0xffffffffu, bits);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = bits;
  __syncthreads();
  const int warps = blockDim.x / 32;
  bits = __reduce_max_sync(0xffffffffu, threadIdx.x % 32 < warps ? of_warps[threadIdx.x % 32] : 0u);
  float scale = __fdiv_rn(__uint_as_float(bits), 127.f);
  if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
  if (bits == 0) scale = 1.f;
  const float inverse = __frcp_rn(scale);
  if (threadIdx.x == 0) scales[row] = scale;
#if VECTORS
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int at = 8 * threadIdx.x + i * step;
    if (at < K) store8(codes, at, v[i], scale, inverse);
  }
#else
  for (int at = 8 * threadIdx.x; at < K; at += step) {
    load8(v, x, smoothing, at);
    store8(codes, at, v, scale, inverse);
  }
#endif
}
#endif

#ifdef BN
// out[m, n] = a_scale[m] * b_scale[n] * sum_k a[m, k] * b[n, k] (+ bias[n]), sums in int32.
// Three warpgroups: one thread of the first loads tiles, its other three warps store finished ones; the
// other two multiply 64 rows each. CTAs of a cluster work on neighbouring rows and share the tile of b.

struct __align__(64) TensorMap { char opaque[128]; };

constexpr int BM = 128, A_BYTES = BM * BK, B_BYTES = BN * BK, STAGE = A_BYTES + B_BYTES;
constexpr int PITCH = 2 * BN + 16;  // bytes of a staged row: the padding spreads rows over the banks
constexpr int STORERS = 96, REGISTERS = BN / 2;
constexpr u64 SWIZZLE = BK == 128 ? 1 : 2;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive_at(u32 bar, u32 cta) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar), "r"(cta) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(bar), "r"(parity) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void load_tile(const TensorMap* map, u32 to, u32 bar, int k, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];"
      ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(row) : "memory");
}
__device__ __forceinline__ void load_tile_for_all(const TensorMap* map, u32 to, u32 bar, int k, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;"
      ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(row), "h"((unsigned short)((1 << CLUSTER) - 1)) : "memory");
}
// A tile of rows of BK bytes, swizzled by as many bytes: groups of 8 rows follow each other.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | ((u64)(BK / 2) << 32) | (SWIZZLE << 62);
}
__device__ __forceinline__ void multiply(int (&d)[REGISTERS], u64 a, u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" WGMMA_P ", 0;\n"
               "wgmma.mma_async.sync.aligned.m64n" WGMMA_N "k32.s32.s8.s8 {" WGMMA_D "}, %" WGMMA_A
               ", %" WGMMA_B ", p;\n}"
               : WGMMA_OUT : "l"(a), "l"(b), "r"(accumulate));
}

struct Tiles {  // in groups of rows, so that tiles at work at the same time share rows and columns
  int rows, columns, group;
  __device__ __forceinline__ void at(int tile, int& m, int& n) const {
    const int span = group * columns, first = tile / span * group, height = min(rows - first, group);
    m = first + tile % span % height;
    n = tile % span / height;
  }
};

__device__ __forceinline__ float number(const void* p, int kind, int at) {
  if (kind == 1) return reinterpret_cast<const float*>(p)[at];
  const u32 half = reinterpret_cast<const unsigned short*>(p)[at];
  if (kind == 2) return __uint_as_float(half << 16);
  float r;
  asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(r) : "r"(half));
  return r;
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
    scaled_product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                   unsigned short* __restrict__ out, const float* __restrict__ a_scale,
                   const void* __restrict__ b_scale, const void* __restrict__ bias, int M, int N, int K,
                   int group) {
  extern __shared__ char raw[];
  const u32 base = (shared_address(raw) + 1023) & ~1023u;
  const u32 full = base + STAGES * STAGE, empty = full + 8 * STAGES;
  char* const staged = raw + (empty + 8 * STAGES - shared_address(raw));
  float* const of_columns = reinterpret_cast<float*>(staged + BM * PITCH);  // scales, then biases
  u32 rank = 0;
#if CLUSTER > 1
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, 2 * CLUSTER);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");

  const Tiles tiles{(M + CLUSTER * BM - 1) / (CLUSTER * BM), (N + BN - 1) / BN, group};
  const int total = tiles.rows * tiles.columns, step = gridDim.x / CLUSTER, steps = (K + BK - 1) / BK;
  const int role = threadIdx.x / 128, begin = blockIdx.x / CLUSTER;

  if (role == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (threadIdx.x == 0) {
      int stage = 0;
      u32 phase = 1;
      for (int tile = begin; tile < total; tile += step) {
        int m, n;
        tiles.at(tile, m, n);
        const int m0 = (CLUSTER * m + rank) * BM, n0 = n * BN + rank * (BN / CLUSTER);
        for (int k = 0; k < steps; ++k) {
          barrier_wait(empty + 8 * stage, phase);
          const u32 to = base + stage * STAGE, bar = full + 8 * stage;
          barrier_expect(bar, STAGE);
          load_tile(&a_map, to, bar, k * BK, m0);
#if CLUSTER == 1
          load_tile(&b_map, to + A_BYTES, bar, k * BK, n0);
#else
          load_tile_for_all(&b_map, to + A_BYTES + rank * (B_BYTES / CLUSTER), bar, k * BK, n0);
#endif
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    } else if (threadIdx.x >= 32) {
      constexpr int CHUNKS = BN / 8, EACH = (64 * CHUNKS + STORERS - 1) / STORERS;
      const int thread = threadIdx.x - 32;
      for (int tile = begin; tile < total; tile += step) {
        int m, n;
        tiles.at(tile, m, n);
        for (int i = thread; i < BN; i += STORERS) {
          const int column = n * BN + i;
          of_columns[i] = column < N ? number(b_scale, SCALE, BY_CHANNEL ? column : 0) : 0.f;
#if BIAS
          of_columns[BN + i] = column < N ? number(bias, BIAS, column) : 0.f;
#endif
        }
        named_arrive(4, 128 + STORERS);
        named_arrive(5, 128 + STORERS);
        for (int half = 0; half < 2; ++half) {
          named_sync(2 + half, 128 + STORERS);
          const int row0 = (CLUSTER * m + rank) * BM + 64 * half;
#pragma unroll 4
          for (int i = 0; i < EACH; ++i) {
            const int chunk = thread + i * STORERS, r = chunk / CHUNKS, column = n * BN + chunk % CHUNKS * 8;
            if (r >= 64 || row0 + r >= M || column >= N) continue;
            const uint4 v =
                *reinterpret_cast<const uint4*>(staged + (64 * half + r) * PITCH + chunk % CHUNKS * 16);
            unsigned short* to = out + (u64)(row0 + r) * N + column;
            if (N % 8 == 0) {
              *reinterpret_cast<uint4*>(to) = v;
            } else {
              const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
              for (int j = 0; j < 8; ++j)
                if (column + j < N) to[j] = (unsigned short)(words[j / 2] >> (16 * (j % 2)));
            }
          }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const int half = role - 1, lane = threadIdx.x % 32, quad = lane % 4;
    const int local = 64 * half + threadIdx.x / 32 % 4 * 16 + lane / 4;
    const bool lag = LAG && steps > LAG;
    int d[REGISTERS], stage = 0, until = lag && !half ? LAG : 0;
    u32 phase = 0;
    // The second half follows the first, so that the tensor cores always have work.
    if (lag && half) named_sync(1, 256);
    for (int tile = begin; tile < total; tile += step) {
      int m, n, previous = -1;
      tiles.at(tile, m, n);
      for (int k = 0; k < steps; ++k) {
        barrier_wait(full + 8 * stage, phase);
        const u32 at = base + stage * STAGE;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < BK / 32; ++i)
          multiply(d, descriptor(at + half * 64 * BK + 32 * i), descriptor(at + A_BYTES + 32 * i), k | i);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (previous >= 0) {
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          if (threadIdx.x % 128 < CLUSTER) barrier_arrive_at(empty + 8 * previous, threadIdx.x % 128);
        }
        if (until && --until == 0) named_arrive(1, 256);
        previous = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      const int row = (CLUSTER * m + rank) * BM + local;
      const float s0 = row < M ? a_scale[row] : 0.f, s1 = row + 8 < M ? a_scale[row + 8] : 0.f;
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < REGISTERS; ++i) asm volatile("" : "+r"(d[i])::"memory");  // not read before this
      if (threadIdx.x % 128 < CLUSTER) barrier_arrive_at(empty + 8 * previous, threadIdx.x % 128);
      named_sync(4 + half, 128 + STORERS);
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        const float2 w = *reinterpret_cast<const float2*>(of_columns + 8 * j + 2 * quad);
#if BIAS
        const float2 b = *reinterpret_cast<const float2*>(of_columns + BN + 8 * j + 2 * quad);
#else
        const float2 b = {0.f, 0.f};
#endif
        const int* v = d + 4 * j;
        char* to = staged + local * PITCH + 16 * j + 4 * quad;
        *reinterpret_cast<u32*>(to) =
            pack_halves(fmaf((float)v[0] * s0, w.x, b.x), fmaf((float)v[1] * s0, w.y, b.y));
        *reinterpret_cast<u32*>(to + 8 * PITCH) =
            pack_halves(fmaf((float)v[2] * s1, w.x, b.x), fmaf((float)v[3] * s1, w.y, b.y));
      }
      named_arrive(2 + half, 128 + STORERS);
    }
  }
  __syncwarp();
  // No CTA leaves while its partner may still signal its barriers.
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
#endif
