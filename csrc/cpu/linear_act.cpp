#include "cpu/linear_act.h"

#include "cpu/activation.h"
#include "cpu/buffer.h"
#include "cpu/digest.h"
#include "cpu/few_rows.h"
#include "cpu/many_rows.h"
#include "cpu/parallel.h"

namespace mplug2_fast::MPLUG2_ISA {
namespace {

static_assert(kHashedRows == kColumns);

// Minimum rows for which packing the weight pays.
constexpr std::int64_t kManyRows = 2 * kMaxRows;

// `products` (rows, kColumns) become the columns of out from `column` on.
template <typename Element, Activation kActivation>
void finish(const LinearActArguments& a, const float* products, std::int64_t row, int rows, std::int64_t column,
            int columns) {
    const auto* bias = static_cast<const Element*>(a.bias);
    const auto* residual = static_cast<const Element*>(a.residual);
    auto* out = static_cast<Element*>(a.out);
    for (int m = 0; m < rows; ++m) {
        const std::int64_t at = (row + m) * a.out_features + column;
        for (int j = 0; j < columns; j += kLanes) {
            const int count = columns - j;
            const bool whole = count >= kLanes;
            const auto take = [&](const Element* from) { return whole ? load(from) : load_first(from, count); };
            F32 value = load(products + m * kColumns + j);
            value = activate<kActivation>(bias ? value + take(bias + column + j) : value);
            value = residual ? value + take(residual + at + j) : value;
            whole ? store(out + at + j, value) : store_first(out + at + j, value, count);
        }
    }
}

template <typename Step>
void run(const LinearActArguments& a) {
    using Element = typename Step::Element;
    const auto* x = static_cast<const Element*>(a.x);
    const auto* weight = static_cast<const Element*>(a.weight);
    const std::int64_t blocks = (a.out_features + kColumns - 1) / kColumns;
    const int max_rows = static_cast<int>(a.rows < kMaxRows ? a.rows : kMaxRows);
    parallel_ranges(a.rows ? blocks : 0, a.threads, [&](std::int64_t begin, std::int64_t end) {
        PackedRows<Step> packed(max_rows, a.in_features);
        const Buffer<float> products(max_rows * kColumns);
        for (std::int64_t row = 0; row < a.rows; row += max_rows) {
            const int rows = static_cast<int>(a.rows - row < max_rows ? a.rows - row : max_rows);
            packed.fill(x + row * a.x_stride, a.x_stride, rows);
            for (std::int64_t block = begin; block < end; ++block) {
                const std::int64_t column = block * kColumns, left = a.out_features - column;
                const int columns = static_cast<int>(left < kColumns ? left : kColumns);
                const Element* first = weight + column * a.in_features;
                const bool hashed = a.hashes && row == 0;
                Digest digest(first);
                for (int j = 0; j < columns; j += kRows) {
                    Rows<Element> w;
                    w.ahead = kRows * a.in_features;
                    for (int r = 0; r < kRows; ++r) {
                        w.row[r] = first + (j + r < columns ? j + r : columns - 1) * a.in_features;
                    }
                    packed.multiply(w, products + j);
                    if (hashed) {
                        digest.absorb_until(w.row[kRows - 1] + a.in_features);
                    }
                }
                if (hashed) {
                    a.hashes[block] = digest.finish(first + columns * a.in_features);
                }
                switch (a.activation) {
                    case Activation::none:
                        finish<Element, Activation::none>(a, products, row, rows, column, columns);
                        break;
                    case Activation::gelu:
                        finish<Element, Activation::gelu>(a, products, row, rows, column, columns);
                        break;
                    case Activation::quick_gelu:
                        finish<Element, Activation::quick_gelu>(a, products, row, rows, column, columns);
                        break;
                }
            }
        }
    });
}

}  // namespace

void linear_act(const LinearActArguments& arguments) {
    const auto& a = arguments;
    if (!a.bf16 && a.rows >= kManyRows && a.in_features > 0 && a.residual != a.out && !a.hashes) {
        multiply_many_rows(a);
    } else {
        a.bf16 ? run<Bf16Step>(a) : run<FloatStep>(a);
    }
}

}  // namespace mplug2_fast::MPLUG2_ISA
