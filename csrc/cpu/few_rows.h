#pragma once

// Products of few rows with a matrix that is read once, without packing: the weight of a decoding step, or the keys
// that the beams of a video attend to.

#include "cpu/buffer.h"
#include "cpu/simd.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

// A tile multiplies kRows rows of the weight by up to kFewTileRows rows of x: their products' sums fill the registers.
#ifdef __AVX512F__
constexpr int kRows = 4;
#else
constexpr int kRows = 2;
#endif
constexpr int kFewTileRows = 6;
constexpr int kColumns = 64;  // of products that are finished together
constexpr int kMaxRows = 64;  // of x, for one pass over the weight
constexpr int kMostTiles = (kMaxRows + kFewTileRows - 1) / kFewTileRows;

// Loops over sums are unrolled early, because otherwise GCC keeps them in memory around the inner loop.
template <int kM>
using Sums = F32[kM][4];

// How kSize elements of the inner dimension are multiplied. Rows of x are first copied to the type `Packed`, kPacked
// numbers for each step; the weight's vectors are loaded without packing.
struct FloatStep {
    using Element = float;
    using Packed = float;
    using Vector = F32;
    static constexpr int kSize = kLanes, kPacked = kLanes;

    MPLUG2_INLINE Vector load(const float* from) { return MPLUG2_ISA::load(from); }
    MPLUG2_INLINE Vector load_first(const float* from, int count) { return MPLUG2_ISA::load_first(from, count); }
    MPLUG2_INLINE void pack(float* to, Vector x) { store(to, x); }

    template <int kM>
    MPLUG2_INLINE void multiply(Sums<kM>& sums, const Vector (&w)[kRows], const float* x) {
#pragma GCC unroll 6
        for (int m = 0; m < kM; ++m) {
            const Vector right = load(x + m * kPacked);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                sums[m][r] += w[r] * right;
            }
        }
    }
};

#ifdef __AVX512BF16__
struct Bf16Step {
    using Element = Bf16;
    using Packed = Bf16;
    using Vector = __m512i;
    static constexpr int kSize = 2 * kLanes, kPacked = 2 * kLanes;

    MPLUG2_INLINE Vector load(const Bf16* from) { return _mm512_loadu_si512(from); }
    MPLUG2_INLINE Vector load_first(const Bf16* from, int count) {
        return _mm512_maskz_loadu_epi16((1u << count) - 1, from);
    }
    MPLUG2_INLINE void pack(Bf16* to, Vector x) { _mm512_storeu_si512(to, x); }

    template <int kM>
    MPLUG2_INLINE void multiply(Sums<kM>& sums, const Vector (&w)[kRows], const Bf16* x) {
#pragma GCC unroll 6
        for (int m = 0; m < kM; ++m) {
            const Vector right = load(x + m * kPacked);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                sums[m][r] = (F32)_mm512_dpbf16_ps((__m512)sums[m][r], (__m512bh)w[r], (__m512bh)right);
            }
        }
    }
};
#else
// Two neighbours in one 32-bit lane: the even one is the lane shifted up, the odd one its upper half. Packed rows of x
// contain the even ones, then the odd ones, in float32.
struct Bf16Step {
    using Element = Bf16;
    using Packed = float;
    using Vector = U32;
    static constexpr int kSize = 2 * kLanes, kPacked = 2 * kLanes;

    MPLUG2_INLINE Vector load(const Bf16* from) {
        Vector value;
        std::memcpy(&value, from, sizeof(value));
        return value;
    }
    MPLUG2_INLINE Vector load_first(const Bf16* from, int count) {
#ifdef __AVX512BW__
        return (Vector)_mm512_maskz_loadu_epi16((1u << count) - 1, from);
#else
        Bf16 buffer[kSize] = {};
        std::memcpy(buffer, from, count * sizeof(Bf16));
        return load(buffer);
#endif
    }
    MPLUG2_INLINE F32 even(Vector value) { return (F32)(value << 16); }
    MPLUG2_INLINE F32 odd(Vector value) { return (F32)(value & 0xFFFF0000u); }
    MPLUG2_INLINE void pack(float* to, Vector x) {
        store(to, even(x));
        store(to + kLanes, odd(x));
    }

    template <int kM>
    MPLUG2_INLINE void multiply(Sums<kM>& sums, const Vector (&w)[kRows], const float* x) {
        F32 left[kRows];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                left[r] = half ? odd(w[r]) : even(w[r]);
            }
#pragma GCC unroll 6
            for (int m = 0; m < kM; ++m) {
                const F32 right = MPLUG2_ISA::load(x + m * kPacked + half * kLanes);
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) {
                    sums[m][r] += left[r] * right;
                }
            }
        }
    }
};
#endif

template <typename Element>
struct Rows {
    const Element* row[kRows];
    std::int64_t ahead;  // the distance of prefetches, in elements
};

// sums[m][r] for kM packed rows of x; `to` has kColumns columns.
template <typename Step, int kM>
void tile(const Rows<typename Step::Element>& w, const typename Step::Packed* x, std::int64_t in_features, float* to) {
    Sums<kM> sums;
#pragma GCC unroll 6
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            sums[m][r] = F32{};
        }
    }
    typename Step::Vector vectors[kRows];
    std::int64_t k = 0;
    for (; k + Step::kSize <= in_features; k += Step::kSize, x += kM * Step::kPacked) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            vectors[r] = Step::load(w.row[r] + k);
            __builtin_prefetch(w.row[r] + k + w.ahead, 0, 2);
        }
        Step::template multiply<kM>(sums, vectors, x);
    }
    if (const int count = static_cast<int>(in_features - k)) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            vectors[r] = Step::load_first(w.row[r] + k, count);
        }
        Step::template multiply<kM>(sums, vectors, x);
    }
#pragma GCC unroll 6
    for (int m = 0; m < kM; ++m) {
        float lanes[4];
        sum4(sums[m], lanes);
        std::memcpy(to + m * kColumns, lanes, kRows * sizeof(float));
    }
}

// x in tiles of rows, each with its steps one after another, and in each step the rows of the tile.
template <typename Step>
class PackedRows {
    using Element = typename Step::Element;
    using Packed = typename Step::Packed;

  public:
    PackedRows(std::int64_t max_rows, std::int64_t in_features)
        : in_features_(in_features),
          steps_((in_features + Step::kSize - 1) / Step::kSize),
          data_(max_rows * steps_ * Step::kPacked) {}

    void fill(const Element* x, std::int64_t stride, int rows) {
        tiles_ = (rows + kFewTileRows - 1) / kFewTileRows;
        for (int t = 0; t <= tiles_; ++t) {
            begins_[t] = rows * t / tiles_;
        }
        for (int t = 0; t < tiles_; ++t) {
            const int count = begin(t + 1) - begin(t);
            for (int m = 0; m < count; ++m) {
                const Element* row = x + (begin(t) + m) * stride;
                Packed* to = data_ + begin(t) * steps_ * Step::kPacked + m * Step::kPacked;
                std::int64_t k = 0;
                for (; k + Step::kSize <= in_features_; k += Step::kSize, to += count * Step::kPacked) {
                    Step::pack(to, Step::load(row + k));
                }
                if (k < in_features_) {
                    Step::pack(to, Step::load_first(row + k, static_cast<int>(in_features_ - k)));
                }
            }
        }
    }

    // The products with kRows rows of the weight.
    void multiply(Rows<Element> w, float* to) const {
        for (int t = 0; t < tiles_; ++t) {
            const Packed* x = data_ + begin(t) * steps_ * Step::kPacked;
            float* at = to + begin(t) * kColumns;
            switch (begin(t + 1) - begin(t)) {
                case 1:
                    tile<Step, 1>(w, x, in_features_, at);
                    break;
                case 2:
                    tile<Step, 2>(w, x, in_features_, at);
                    break;
                case 3:
                    tile<Step, 3>(w, x, in_features_, at);
                    break;
                case 4:
                    tile<Step, 4>(w, x, in_features_, at);
                    break;
                case 5:
                    tile<Step, 5>(w, x, in_features_, at);
                    break;
                default:
                    tile<Step, 6>(w, x, in_features_, at);
            }
        }
    }

  private:
    int begin(int tile) const { return begins_[tile]; }

    std::int64_t in_features_, steps_;
    Buffer<Packed> data_;
    int tiles_ = 0;
    // The first row of each tile. Computing it by a division would take as long as a tile of short rows.
    int begins_[kMostTiles + 1] = {};
};

}  // namespace
}  // namespace mplug2_fast::MPLUG2_ISA
