// Quantizers in one pass over memory. nibblecore.qat.kernels compiles and loads this file; qat/lsq.py and
// qat/regularization.py say what is computed, and compute the same where there is no compiler.
//
// Compiled without -ffast-math and without contraction: division, rounding and products are those of IEEE 754, and so
// the bits are those of torch. Sums differ from torch's in their order only, and do not depend on the number of threads:
// values are added in LANES partial sums over blocks of fixed size, and blocks in double, in order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <thread>
#include <vector>

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 8192;          // values: what one thread does at a time, in its cache
constexpr int64_t WORTH_A_THREAD = 1 << 18;  // values: below, starting a thread costs more than it saves

enum Kind : int64_t { HALF_UP = 0, HALF_EVEN = 1, W8 = 2 };

struct Range {
    float low, high;
};

// NaN stays NaN, as in torch.
inline float limit(float u, Range r) {
    const float above = u < r.low ? r.low : u;
    return above > r.high ? r.high : above;
}

template <Kind KIND>
inline float quantize(float u, Range r) {
    const float limited = limit(u, r);
    if (KIND == HALF_UP) return limit(std::floor(u + 0.5f), r);
    const float nearest = std::nearbyint(limited);
    if (KIND == HALF_EVEN) return nearest;
    // 16*k + 8 is no code of 8-bit weights: to the neighbour nearer to the value, ties toward zero.
    const float sixteenths = (nearest - 8.0f) * 0.0625f;
    const float away = std::fabs(limited) > std::fabs(nearest) ? 1.0f : -1.0f;
    const float step = nearest > 0.0f ? away : -away;
    return sixteenths == std::floor(sixteenths) ? nearest + step : nearest;
}

// Runs work(first, last) over blocks 0..count-1 on up to `threads` threads.
template <typename Work>
void spread(int64_t blocks, int64_t values, int64_t threads, const Work& work) {
    const int64_t used = std::min({threads, blocks, std::max<int64_t>(1, values / WORTH_A_THREAD)});
    if (used <= 1) {
        work(int64_t{0}, blocks);
        return;
    }
    std::vector<std::thread> others;
    others.reserve(used - 1);
    const int64_t share = (blocks + used - 1) / used;
    for (int64_t t = 1; t < used; ++t)
        others.emplace_back([&work, t, share, blocks] { work(t * share, std::min(blocks, (t + 1) * share)); });
    work(int64_t{0}, std::min(blocks, share));
    for (auto& thread : others) thread.join();
}

// A tensor is rows x columns with a step for each row; blocks never cross rows, and short rows share one.
struct Blocks {
    int64_t rows, columns, per_row, rows_per_block, count;

    Blocks(int64_t rows, int64_t columns) : rows(rows), columns(columns) {
        per_row = std::max<int64_t>(1, (columns + BLOCK - 1) / BLOCK);
        rows_per_block = per_row > 1 ? 1 : std::max<int64_t>(1, BLOCK / std::max<int64_t>(1, columns));
        count = per_row > 1 ? rows * per_row : (rows + rows_per_block - 1) / rows_per_block;
    }

    // Calls work(row, first column, end) for the pieces of blocks first..last-1.
    template <typename Work>
    void pieces(int64_t first, int64_t last, const Work& work) const {
        for (int64_t b = first; b < last; ++b) {
            if (per_row > 1) {
                const int64_t row = b / per_row, start = (b % per_row) * BLOCK;
                work(row, start, std::min(columns, start + BLOCK));
            } else {
                for (int64_t row = b * rows_per_block; row < std::min(rows, (b + 1) * rows_per_block); ++row)
                    work(row, int64_t{0}, columns);
            }
        }
    }
};

double add_up(const float (&lanes)[LANES]) {
    double sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
}

template <Kind KIND>
void forward(const float* v, const float* step, const float* gain, float* out, Blocks blocks, Range r, int64_t threads) {
    spread(blocks.count, blocks.rows * blocks.columns, threads, [=](int64_t first, int64_t last) {
        blocks.pieces(first, last, [=](int64_t row, int64_t start, int64_t end) {
            const float s = step[row];
            const float* const x = v + row * blocks.columns;
            float* const y = out + row * blocks.columns;
            if (gain) {
                const float g = gain[row];
                for (int64_t i = start; i < end; ++i) y[i] = quantize<KIND>(x[i] / s, r) * s * g;
            } else {
                for (int64_t i = start; i < end; ++i) y[i] = quantize<KIND>(x[i] / s, r) * s;
            }
        });
    });
}

constexpr int64_t LEVELS = 16;  // bins of 4 bits

// What bin regularization adds to the gradients: nothing where population is null.
struct Bins {
    const float* population;  // rows x LEVELS
    float grad;
    bool to_step;

    // Factors of value - level by bin.
    void weights(int64_t row, float (&weight)[LEVELS]) const {
        for (int64_t level = 0; level < LEVELS; ++level) {
            const float count = population[row * LEVELS + level];
            weight[level] = count > 0 ? 2.0f * grad / count : 0.0f;
        }
    }
};

// Sets the gradient of one value and returns its part of the step's.
template <Kind KIND>
inline float backward_of(float x, float s, float gradient, Range r, float& grad_v) {
    const float u = x / s, code = quantize<KIND>(u, r);
    const bool outside = (u <= r.low) | (u >= r.high);
    grad_v = outside ? 0.0f : gradient;
    return gradient * (outside ? code : code - u);
}

// Adds that of bin regularization.
inline float binned_of(float x, float s, Range r, const float (&weight)[LEVELS], float& grad_v) {
    const float code = quantize<HALF_EVEN>(x / s, r);
    const float pull = (x - code * s) * weight[static_cast<int32_t>(code - r.low) & (LEVELS - 1)];
    grad_v += pull;
    return pull * code;
}

template <Kind KIND, bool BINNED>
void backward(const float* v, const float* step, const float* gain, const float* grad, float* grad_v, float* grad_step,
              float grad_scale, Blocks blocks, Range r, Bins bins, int64_t threads) {
    std::vector<double> sums(2 * blocks.rows * blocks.per_row);
    double* const sum = sums.data();
    spread(blocks.count, blocks.rows * blocks.columns, threads, [=](int64_t first, int64_t last) {
        blocks.pieces(first, last, [=](int64_t row, int64_t start, int64_t end) {
            const float s = step[row], factor = gain ? gain[row] : 1.0f;
            const float* const x = v + row * blocks.columns;
            const float* const g = grad + row * blocks.columns;
            float* const gv = grad_v + row * blocks.columns;
            float weight[LEVELS];
            if (BINNED) bins.weights(row, weight);
            float lanes[LANES] = {}, binned[LANES] = {};
            int64_t i = start;
            for (; i + LANES <= end; i += LANES) {
                for (int64_t j = 0; j < LANES; ++j)
                    lanes[j] += backward_of<KIND>(x[i + j], s, g[i + j] * factor, r, gv[i + j]);
                if (BINNED)
                    for (int64_t j = 0; j < LANES; ++j) binned[j] -= binned_of(x[i + j], s, r, weight, gv[i + j]);
            }
            for (int64_t j = 0; i < end; ++i, ++j) {
                lanes[j] += backward_of<KIND>(x[i], s, g[i] * factor, r, gv[i]);
                if (BINNED) binned[j] -= binned_of(x[i], s, r, weight, gv[i]);
            }
            double* const pair = sum + 2 * (row * blocks.per_row + start / BLOCK);
            pair[0] = add_up(lanes);
            pair[1] = add_up(binned);
        });
    });
    for (int64_t row = 0; row < blocks.rows; ++row) {
        double total = 0, binned = 0;
        for (int64_t b = 0; b < blocks.per_row; ++b) {
            total += sum[2 * (row * blocks.per_row + b)];
            binned += sum[2 * (row * blocks.per_row + b) + 1];
        }
        grad_step[row] = static_cast<float>(total) * grad_scale;
        if (BINNED && bins.to_step) grad_step[row] += static_cast<float>(binned);
    }
}

}  // namespace

extern "C" {

// out = code(v / step) * step [* gain]; v and out are rows x columns, step and gain have a value for each row.
void nibble_lsq_forward(const float* v, const float* step, const float* gain, float* out, int64_t rows, int64_t columns,
                        int64_t low, int64_t high, int64_t kind, int64_t threads) {
    const Blocks blocks(rows, columns);
    const Range r{static_cast<float>(low), static_cast<float>(high)};
    const auto run = kind == HALF_UP ? forward<HALF_UP> : kind == HALF_EVEN ? forward<HALF_EVEN> : forward<W8>;
    run(v, step, gain, out, blocks, r, threads);
}

// The gradients of that, of grad; grad_step is also multiplied by grad_scale. Where population is not null, of bins_grad
// times the bin regularization loss besides: of 4 bits and fewer, rounded half to even.
void nibble_lsq_backward(const float* v, const float* step, const float* gain, const float* grad, float* grad_v,
                         float* grad_step, float grad_scale, const float* population, float bins_grad,
                         int64_t bins_to_step, int64_t rows, int64_t columns, int64_t low, int64_t high, int64_t kind,
                         int64_t threads) {
    const Blocks blocks(rows, columns);
    const Range r{static_cast<float>(low), static_cast<float>(high)};
    const auto run = population          ? backward<HALF_EVEN, true>
                     : kind == HALF_UP   ? backward<HALF_UP, false>
                     : kind == HALF_EVEN ? backward<HALF_EVEN, false>
                                         : backward<W8, false>;
    run(v, step, gain, grad, grad_v, grad_step, grad_scale, blocks, r, Bins{population, bins_grad, bins_to_step != 0},
        threads);
}

// What one layer's chip parameters are in real numbers, see QuantLayer._parameters_for: steps of the weights from the
// stored ones, of which there are `stored` (1 or rows); the factor by which rounding changes each multiplier; and biases
// (or null), rounded. output_step is 0 where nothing is requantized.
void nibble_parameters(const float* raw, int64_t stored, const float* bias, double input_step, double output_step,
                       float step_min, int64_t mult_bits, int64_t shift_max, float* step, float* gain, float* bias_out,
                       int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
        const float magnitude = std::fabs(raw[stored > 1 ? row : 0]);
        step[row] = magnitude < step_min ? step_min : magnitude;
        const double unit = input_step * static_cast<double>(step[row]);
        double factor = 1;
        if (output_step != 0) {
            const double ratio = unit / output_step;
            int exponent;
            std::frexp(ratio, &exponent);
            const int shift = static_cast<int>(std::min<int64_t>(mult_bits - 1 - exponent, shift_max));
            const double scale = std::ldexp(1.0, shift);
            factor = std::floor(ratio * scale + 0.5) / scale / ratio;
        }
        gain[row] = static_cast<float>(factor);
        if (bias) {
            const double exact = bias[row];
            const double rounded = std::floor(exact / unit + 0.5) * unit * factor;
            bias_out[row] = static_cast<float>(exact + (rounded - exact));
        }
    }
}

// Bin regularization of rows that are rounded half to even and have bins of their own: the loss, and the population of
// each bin, rows x LEVELS.
double nibble_bins_forward(const float* v, const float* step, float* population, int64_t rows, int64_t columns,
                           int64_t low, int64_t high, int64_t threads) {
    const Range r{static_cast<float>(low), static_cast<float>(high)};
    std::vector<double> losses(rows);
    double* const loss = losses.data();
    spread(rows, rows * columns, threads, [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const float* const x = v + row * columns;
            const float s = step[row];
            // Four of each in turns, as a bin is often that of the value before.
            int32_t counts[4][LEVELS] = {};
            float squares[4][LEVELS] = {};
            constexpr int64_t CHUNK = 512;
            int32_t bins[CHUNK];
            float square[CHUNK];
            double totals[LEVELS] = {};
            for (int64_t start = 0; start < columns; start += CHUNK) {
                const int64_t size = std::min(CHUNK, columns - start);
                for (int64_t i = 0; i < size; ++i) {
                    const float code = quantize<HALF_EVEN>(x[start + i] / s, r);
                    const float difference = x[start + i] - code * s;
                    square[i] = difference * difference;
                    bins[i] = static_cast<int32_t>(code - r.low) & (LEVELS - 1);
                }
                int64_t i = 0;
                for (; i + 4 <= size; i += 4) {
                    for (int64_t j = 0; j < 4; ++j) {
                        counts[j][bins[i + j]] += 1;
                        squares[j][bins[i + j]] += square[i + j];
                    }
                }
                for (; i < size; ++i) {
                    counts[0][bins[i]] += 1;
                    squares[0][bins[i]] += square[i];
                }
                for (auto& part : squares) {
                    for (int64_t level = 0; level < LEVELS; ++level) totals[level] += part[level];
                    std::fill(std::begin(part), std::end(part), 0.0f);
                }
            }
            double sum = 0;
            for (int64_t level = 0; level < LEVELS; ++level) {
                const int32_t count = counts[0][level] + counts[1][level] + counts[2][level] + counts[3][level];
                population[row * LEVELS + level] = static_cast<float>(count);
                if (count) sum += totals[level] / count;
            }
            loss[row] = sum;
        }
    });
    double total = 0;
    for (double one : losses) total += one;
    return total;
}

// Its gradients, times grad; grad_step may be null.
void nibble_bins_backward(const float* v, const float* step, const float* population, float grad, float* grad_v,
                          float* grad_step, int64_t rows, int64_t columns, int64_t low, int64_t high, int64_t threads) {
    const Range r{static_cast<float>(low), static_cast<float>(high)};
    spread(rows, rows * columns, threads, [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const float* const x = v + row * columns;
            float* const gv = grad_v + row * columns;
            const float s = step[row];
            float weight[LEVELS];
            Bins{population, grad, true}.weights(row, weight);
            float lanes[LANES] = {};
            int64_t i = 0;
            const auto one = [&](int64_t k, float& lane) {
                const float code = quantize<HALF_EVEN>(x[k] / s, r);
                const float slope = (x[k] - code * s) * weight[static_cast<int32_t>(code - r.low) & (LEVELS - 1)];
                gv[k] = slope;
                lane -= slope * code;
            };
            for (; i + LANES <= columns; i += LANES)
                for (int64_t j = 0; j < LANES; ++j) one(i + j, lanes[j]);
            for (int64_t j = 0; i < columns; ++i, ++j) one(i, lanes[j]);
            if (grad_step) grad_step[row] = static_cast<float>(add_up(lanes));
        }
    });
}
}
