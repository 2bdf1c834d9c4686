#include "cpu/linear_int8.h"

#include "cpu/activation.h"
#include "cpu/int8.h"
#include "cpu/kept_memory.h"
#include "cpu/parallel.h"
#include "cpu/product.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

constexpr std::int64_t kPanelColumns = kProductVectors * kLanes;
// Packed columns that are multiplied together stay in the second-level cache.
constexpr std::int64_t kGroupBytes = 512 << 10;
constexpr std::int64_t kGap = 64;  // in bytes, keeps the rows of x out of the same sets of the cache

// What becomes of finished sums.
template <typename Element>
struct Epilogue {
    const float* scale;
    const Element* bias;
    const Element* residual;
    Element* out;
    std::int64_t out_features;
    Activation activation;
};

template <typename Element>
Epilogue<Element> epilogue(const LinearInt8Arguments& a) {
    return {a.scale,
            static_cast<const Element*>(a.bias),
            static_cast<const Element*>(a.residual),
            static_cast<Element*>(a.out),
            a.out_features,
            a.activation};
}

// kLanes columns at most, with their part of the epilogue.
template <typename Element>
class Columns {
  public:
    inline __attribute__((always_inline)) Columns(const Epilogue<Element>& e, std::int64_t column, std::int64_t count)
        : e_(e), column_(column), count_(count), scale_(take(e.scale + column)) {
        bias_ = e.bias ? take(e.bias + column) : F32{};
    }

    // Writes the columns of a row.
    inline __attribute__((always_inline)) void write(F32 sum, float row_scale, std::int64_t row) const {
        constexpr int kBits = sizeof(Element) == 2 ? 8 : 24;
        const std::int64_t at = row * e_.out_features + column_;
        F32 value = sum * (scale_ * row_scale) + bias_;
        if (e_.activation == Activation::quick_gelu) {
            value = quick_gelu<kBits>(value);
        } else if (e_.activation == Activation::gelu) {
            value = gelu(value);
        }
        value = e_.residual ? value + take(e_.residual + at) : value;
        count_ >= kLanes ? store(e_.out + at, value) : store_first(e_.out + at, value, static_cast<int>(count_));
    }

  private:
    template <typename From>
    inline __attribute__((always_inline)) F32 take(const From* from) const {
        return count_ >= kLanes ? load(from) : load_first(from, static_cast<int>(count_));
    }

    const Epilogue<Element>& e_;
    const std::int64_t column_, count_;
    const F32 scale_;
    F32 bias_;
};

// A row of x as whole numbers, of which the least is stored as 0 where they are bytes. Sums of products start as if
// kMiddle had been added to all numbers; `offset` times these starts is missing.
constexpr std::int32_t kMiddle = 128;

struct RowOf {
    float scale;
    float offset;
};

// The products of kRows rows of x with a panel of kVectors * kLanes packed columns.
template <typename Element, int kRows, int kVectors>
__attribute__((noinline)) void multiply_panel(const char* x, std::int64_t x_bytes, const RowOf* of_rows,
                                              const Word* panel, const std::int32_t* starts, std::int64_t words,
                                              const Epilogue<Element>& e, std::int64_t row, std::int64_t column,
                                              std::int64_t columns) {
    I32 acc[kRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) {
            acc[r][n] = MPLUG2_BYTES ? load_i32(starts + n * kLanes) : I32{};
        }
    }
    const Word* weight = panel;
    for (std::int64_t w = 0; w < words; ++w, x += sizeof(Word), weight += kLanes) {
        U32 vectors[kVectors];
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) {
            vectors[n] = load_words(weight + n * words * kLanes);
        }
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            Word one;
            std::memcpy(&one, x + r * x_bytes, sizeof(one));
            const U32 all = one - U32{};
#pragma GCC unroll 4
            for (int n = 0; n < kVectors; ++n) {
                acc[r][n] = dot(acc[r][n], all, vectors[n]);
            }
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
        if (n * kLanes >= columns) {
            break;
        }
        const Columns<Element> out(e, column + n * kLanes, columns - n * kLanes);
        [[maybe_unused]] const F32 start = __builtin_convertvector(load_i32(starts + n * kLanes), F32);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            F32 sum = __builtin_convertvector(acc[r][n], F32);
            if constexpr (MPLUG2_BYTES) {
                sum += start * of_rows[r].offset;
            }
            out.write(sum, of_rows[r].scale, row + r);
        }
    }
}

template <typename Element, int kRows = kProductRows, typename... Rest>
MPLUG2_INLINE void multiply_rows(int rows, const Rest&... rest) {
    if constexpr (kRows > 1) {
        if (rows < kRows) {
            return multiply_rows<Element, kRows - 1>(rows, rest...);
        }
    }
    multiply_panel<Element, kRows, kProductVectors>(rest...);
}

// Up to kLanes rows of the weight become a vector a word; missing rows and numbers are zero. `rows` has room for them.
// Also writes what sums of products start with: -kMiddle times the sum of each row.
void pack_columns(const std::int8_t* weight, std::int64_t in_features, std::int64_t count, std::int64_t words,
                  WideNumber* rows, Word* to, [[maybe_unused]] std::int32_t* start) {
    const std::int64_t stride = words * kNumbers;
    for (std::int64_t j = 0; j < count; ++j) {
        WideNumber* row = rows + j * stride;
        for (std::int64_t k = 0; k < in_features; ++k) {
            row[k] = weight[j * in_features + k];
        }
        for (std::int64_t k = in_features; k < stride; ++k) {
            row[k] = 0;
        }
    }
    const Tokens<float> tokens{reinterpret_cast<const float*>(rows), words, nullptr};
    pack_keys<false>(tokens, 0, count, words, 0, to);
#if MPLUG2_BYTES
    I32 sums = {};
    for (std::int64_t w = 0; w < words; ++w) {
        sums = dot(sums, U32{} + 0x01010101u, load_words(to + w * kLanes));
    }
    sums = -kMiddle * sums;
    std::memcpy(start, &sums, sizeof(sums));
#endif
}

// Rows of x as integers, shared by the threads, which then divide the columns among them.
template <typename Element>
void run_wide(const LinearInt8Arguments& a) {
    const auto* x = static_cast<const Element*>(a.x);
    const std::int64_t words = divide_up(a.in_features, kNumbers);
    const std::int64_t x_bytes = round_up(words * static_cast<std::int64_t>(sizeof(Word)) + 64, 64) + kGap;
    const std::int64_t panels = divide_up(a.out_features, kPanelColumns);
    const std::int64_t panel_words = words * kPanelColumns;
    const std::int64_t panel_bytes = panel_words * static_cast<std::int64_t>(sizeof(Word));
    const std::int64_t fitting = panel_bytes ? kGroupBytes / panel_bytes : 1;  // none without in_features
    const std::int64_t group = fitting > 1 ? at_most(fitting, panels) : 1;
    const std::int64_t packed_bytes = Scratch::bytes<Word>(group * panel_words);
    const std::int64_t start_bytes = Scratch::bytes<std::int32_t>(group * kPanelColumns);
    const std::int64_t rows_bytes = Scratch::bytes<Word>(words * kLanes);
    const std::int64_t own_bytes = packed_bytes + start_bytes + rows_bytes;
    const std::int64_t scale_bytes = Scratch::bytes<RowOf>(a.rows), all_x = a.rows * x_bytes;
    char* shared = static_cast<char*>(kept_memory(own_bytes + scale_bytes + all_x));
    auto* of_rows = reinterpret_cast<RowOf*>(shared + own_bytes);
    char* numbers = shared + own_bytes + scale_bytes;
    parallel_ranges(a.rows, a.threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) {
            auto* to = reinterpret_cast<Number*>(numbers + r * x_bytes);
            const Element* row = x + r * a.x_stride;
            const Range of_row = range(row, a.in_features);
            const float scale = of_row.finite() ? of_row.high / 255.0f + of_row.low / 255.0f : 0.0f;
            const std::int32_t zero = nearest_integer(of_row.low, scale);
            quantise(row, a.in_features, scale,
                     [&](std::int64_t i, I32 numbers) { store_bytes(to + i, numbers, zero); });
            of_rows[r] = {result_scale(of_row, scale), static_cast<float>(zero - kMiddle) / kMiddle};
        }
    });
    const Epilogue<Element> e = epilogue<Element>(a);
    parallel_ranges(panels, a.threads, [&](std::int64_t begin, std::int64_t end) {
        char* memory = begin == 0 ? shared : static_cast<char*>(kept_memory(own_bytes));
        auto* packed = reinterpret_cast<Word*>(memory);
        auto* starts = reinterpret_cast<std::int32_t*>(memory + packed_bytes);
        auto* rows = reinterpret_cast<WideNumber*>(memory + packed_bytes + start_bytes);
        for (std::int64_t first = begin; first < end; first += group) {
            const std::int64_t count = at_most(group, end - first);
            for (std::int64_t v = 0; v < count * kProductVectors; ++v) {
                const std::int64_t column = first * kPanelColumns + v * kLanes;
                const std::int64_t left = a.out_features - column;
                pack_columns(a.weight + (left > 0 ? column * a.in_features : 0), a.in_features,
                             left > 0 ? at_most(left, kLanes) : 0, words, rows, packed + v * words * kLanes,
                             starts + v * kLanes);
            }
            for (std::int64_t r = 0; r < a.rows; r += kProductRows) {
                const int height = static_cast<int>(at_most(kProductRows, a.rows - r));
                for (std::int64_t p = 0; p < count; ++p) {
                    const std::int64_t column = (first + p) * kPanelColumns;
                    multiply_rows<Element>(height, numbers + r * x_bytes, x_bytes, of_rows + r,
                                           packed + p * panel_words, starts + p * kPanelColumns, words, e, r, column,
                                           at_most(kPanelColumns, a.out_features - column));
                }
            }
        }
    });
}

// Rows of the weight that are read together, and the most rows of x that are multiplied with them at a time. With two
// vectors of bytes for a row of x, their sums fit into the registers.
#ifdef __AVX512F__
constexpr int kWeightRows = 4;
#else
constexpr int kWeightRows = 2;
#endif
constexpr int kRowsOfFew = 3;
constexpr std::int64_t kFewColumns = 64;        // that are finished together
constexpr std::int64_t kMostFewRows = 64;       // of x, for one pass over the weight
constexpr std::int64_t kAheadBytes = 16 << 10;  // of the weight, that are fetched before they are multiplied
constexpr std::int64_t kLoaded = kLanes * kNumbers;

// kLoaded numbers of the weight as `dot` takes them; of the last ones, only `count` exist.
MPLUG2_INLINE U32 load_weight(const std::int8_t* from, std::int64_t count) {
    std::int8_t buffer[kLoaded];
    if (count < kLoaded) {
        std::memset(buffer, 0, sizeof(buffer));
        std::memcpy(buffer, from, static_cast<std::size_t>(count));
        from = buffer;
    }
#if MPLUG2_BYTES
    return (U32)_mm512_loadu_si512(from);
#elif defined(__AVX512BW__)
    return (U32)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
    return (U32)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    WideNumber wide[kLoaded];
    for (int i = 0; i < kLoaded; ++i) {
        wide[i] = from[i];
    }
    U32 value;
    std::memcpy(&value, wide, sizeof(value));
    return value;
#endif
}

// A 16-bit number of x is one number in memory, or two bytes: the number plus 2^15 is 256 times the first one plus the
// second one. The bytes of a row of x are in two rows of memory.
#if MPLUG2_BYTES
constexpr int kParts = 2;
#else
constexpr int kParts = 1;
#endif
// So many steps add up without overflow. Bytes are added up in one go.
constexpr std::int64_t kSafeSteps = kParts == 2 ? kMostInt8Inputs / kLoaded : 256;

// Products of kM rows of x with kWeightRows rows of the weight, `of_ones` those of a row of ones. With kOnes, writes
// the latter, otherwise reads them.
template <int kM, bool kOnes>
__attribute__((noinline)) void few_products(const Number* x, std::int64_t x_stride,
                                            const std::int8_t* const (&rows)[kWeightRows], std::int64_t in_features,
                                            std::int64_t ahead, I32 (&of_ones)[kWeightRows], float* to) {
    constexpr int kSums = kM * kParts;
    F32 totals[kM][4] = {};
    for (std::int64_t begin = 0; begin < in_features; begin += kSafeSteps * kLoaded) {
        const std::int64_t end = at_most(in_features, begin + kSafeSteps * kLoaded);
        I32 sums[kSums][kWeightRows], ones[kWeightRows];
#pragma GCC unroll 4
        for (int r = 0; r < kWeightRows; ++r) {
            ones[r] = I32{};
#pragma GCC unroll 6
            for (int m = 0; m < kSums; ++m) {
                sums[m][r] = I32{};
            }
        }
        for (std::int64_t k = begin; k < end; k += kLoaded) {
            U32 weight[kWeightRows];
#pragma GCC unroll 4
            for (int r = 0; r < kWeightRows; ++r) {
                weight[r] = load_weight(rows[r] + k, end - k);
                __builtin_prefetch(rows[r] + k + ahead, 0, 2);
                if constexpr (kOnes && kParts == 2) {
                    ones[r] = dot(ones[r], U32{} + 0x01010101u, weight[r]);
                }
            }
#pragma GCC unroll 6
            for (int m = 0; m < kSums; ++m) {
                U32 numbers;
                std::memcpy(&numbers, x + m * x_stride + k, sizeof(numbers));
#pragma GCC unroll 4
                for (int r = 0; r < kWeightRows; ++r) {
                    sums[m][r] = dot(sums[m][r], numbers, weight[r]);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kWeightRows; ++r) {
            if constexpr (kOnes) {
                of_ones[r] = ones[r];
            }
#pragma GCC unroll 3
            for (int m = 0; m < kM; ++m) {
                if constexpr (kParts == 2) {
                    const I32 upper = sums[2 * m][r] - 128 * of_ones[r];
                    totals[m][r] +=
                        256.0f * __builtin_convertvector(upper, F32) + __builtin_convertvector(sums[2 * m + 1][r], F32);
                } else {
                    totals[m][r] += __builtin_convertvector(sums[m][r], F32);
                }
            }
        }
    }
#pragma GCC unroll 3
    for (int m = 0; m < kM; ++m) {
        float lanes[4];
        sum4(totals[m], lanes);
        std::memcpy(to + m * kFewColumns, lanes, kWeightRows * sizeof(float));
    }
}

// The products of all rows of x with kWeightRows rows of the weight.
void multiply_few(const Number* x, std::int64_t rows, std::int64_t stride,
                  const std::int8_t* const (&weight)[kWeightRows], std::int64_t in_features, float* to) {
    const std::int64_t ahead = round_up(kAheadBytes, kWeightRows * (in_features > 0 ? in_features : 1));
    I32 ones[kWeightRows];
    std::int64_t r = at_most(rows, kRowsOfFew - 1);  // leaves registers for the products with ones
    (r == 1 ? few_products<1, true> : few_products<2, true>)(x, stride, weight, in_features, ahead, ones, to);
    while (r < rows) {
        const std::int64_t count = at_most(rows - r, kRowsOfFew);
        const auto multiply = count == 1   ? few_products<1, false>
                              : count == 2 ? few_products<2, false>
                                           : few_products<3, false>;
        multiply(x + r * kParts * stride, stride, weight, in_features, ahead, ones, to + r * kFewColumns);
        r += count;
    }
}

template <typename Element>
void run_few(const LinearInt8Arguments& a) {
    const auto* x = static_cast<const Element*>(a.x);
    const std::int64_t most = at_most(a.rows, kMostFewRows), blocks = divide_up(a.out_features, kFewColumns);
    const std::int64_t stride = round_up(a.in_features, kLoaded) + kGap;
    const Buffer<Number> numbers(most * kParts * stride);
    const Epilogue<Element> e = epilogue<Element>(a);
    float scales[kMostFewRows];
    for (std::int64_t first = 0; first < a.rows; first += most) {
        const std::int64_t rows = at_most(most, a.rows - first);
        for (std::int64_t r = 0; r < rows; ++r) {
            Number* to = numbers + r * kParts * stride;
            std::memset(to, 0, kParts * stride * sizeof(Number));
            const Element* row = x + (first + r) * a.x_stride;
            const Range of_row = range(row, a.in_features);
            const float scale = of_row.finite() ? of_row.size() / 32767.0f : 0.0f;
            scales[r] = result_scale(of_row, scale);
            quantise(row, a.in_features, scale, [&](std::int64_t i, I32 number) {
                if constexpr (kParts == 2) {
                    store_numbers(to + i, (number + 32768) >> 8);
                    store_numbers(to + stride + i, (number + 32768) & 255);
                } else {
                    store_numbers(to + i, number);
                }
            });
        }
        parallel_ranges(blocks, a.threads, [&](std::int64_t begin, std::int64_t end) {
            const Buffer<float> products(rows * kFewColumns);
            for (std::int64_t block = begin; block < end; ++block) {
                const std::int64_t column = block * kFewColumns,
                                   columns = at_most(kFewColumns, a.out_features - column);
                for (std::int64_t c = 0; c < columns; c += kWeightRows) {
                    const std::int8_t* weight[kWeightRows];
                    for (int r = 0; r < kWeightRows; ++r) {
                        weight[r] = a.weight + (column + at_most(c + r, columns - 1)) * a.in_features;
                    }
                    multiply_few(numbers, rows, stride, weight, a.in_features, products + c);
                }
                for (std::int64_t c = 0; c < columns; c += kLanes) {
                    const Columns<Element> out(e, column + c, columns - c);
                    for (std::int64_t r = 0; r < rows; ++r) {
                        out.write(load(products + r * kFewColumns + c), scales[r], first + r);
                    }
                }
            }
        });
    }
}

}  // namespace

void linear_int8(const LinearInt8Arguments& arguments) {
    if (arguments.rows == 0 || arguments.out_features == 0) {
        return;
    }
    if (arguments.bits == 16) {
        arguments.bf16 ? run_few<Bf16>(arguments) : run_few<float>(arguments);
    } else {
        arguments.bf16 ? run_wide<Bf16>(arguments) : run_wide<float>(arguments);
    }
}

}  // namespace mplug2_fast::MPLUG2_ISA
