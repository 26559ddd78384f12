// A leaf of the column loop of sqft/core/columns.py: neighbouring columns are settled in order, and each one's error goes
// on to those that follow in the leaf. Every operation is rounded by itself, as in the kernel for CUDA.
//
// Plain C at the border: sqft/kernels/settle.py has this file built and calls it through ctypes. Vectors are the
// compiler's own; it must be built with -ffp-contract=off.

#include <cstdint>
#include <cstring>

#include "threads.h"

extern "C" struct Leaf {
    int64_t start, count;     // columns, in the loop's order; count is at most LEAF
    int64_t rows;             // O, out features: what is contiguous
    float *work;              // [columns, O]: weights as updated so far; of settled columns, their errors
    const float *factor;      // U, by strides
    int64_t factor_row, factor_column;
    const int32_t *order;     // of the columns
    const uint8_t *kept;      // [columns, O] in the weight's own order, or null: all are kept
    float *value;             // [columns, O] in the weight's own order
    // A grid, or null: [groups, O].
    const float *scale, *low, *high;
    float *rounded;           // [columns, O], q - z
    int64_t group;            // columns of a group
};

namespace {

constexpr int LEAF = 32, WIDE = 64;  // columns of a leaf at most; rows of a tile, which stays in the first cache

// What a column becomes, and its error in its place.
inline void settle(const Leaf &p, int64_t column, int64_t o, int64_t wide, float diagonal, float *weight) {
    const int64_t own = column * p.rows + o;
    float settled[WIDE];
    if (p.scale) {
        const int64_t of_group = column / p.group * p.rows + o;
        const float *scale = p.scale + of_group, *low = p.low + of_group, *high = p.high + of_group;
        const float even = 12582912.0f;  // 1.5 * 2^23: a sum with it rounds to nearest, ties to even
        for (int64_t j = 0; j < wide; j++) {
            float position = weight[j] / scale[j];
            p.value[own + j] = position;
            // A step beyond the grid rounds to outside as any farther one does, and stays where `even` is exact.
            float near = position < low[j] - 1 ? low[j] - 1 : position;
            near = near > high[j] + 1 ? high[j] + 1 : near;
            near = (near + even) - even;
            near = near < low[j] ? low[j] : near;
            settled[j] = near > high[j] ? high[j] : near;
        }
    } else {
        memcpy(settled, weight, wide * sizeof *weight);
    }
    if (p.kept)
        for (int64_t j = 0; j < wide; j++) settled[j] = p.kept[own + j] ? settled[j] : 0.0f;
    memcpy((p.scale ? p.rounded : p.value) + own, settled, wide * sizeof *settled);
    if (p.scale) {
        const float *scale = p.scale + column / p.group * p.rows + o;
        for (int64_t j = 0; j < wide; j++) settled[j] = settled[j] * scale[j];
    }
    for (int64_t j = 0; j < wide; j++) weight[j] = (weight[j] - settled[j]) / diagonal;
}

void settle_rows(const void *job, int64_t begin, int64_t end) {
    const Leaf &p = *(const Leaf *)job;
    float factor[LEAF][LEAF];
    for (int64_t c = 0; c < p.count; c++)
        for (int64_t k = c; k < p.count; k++)
            factor[c][k] = p.factor[(p.start + c) * p.factor_row + (p.start + k) * p.factor_column];
    alignas(64) float tile[LEAF][WIDE] = {}, error[WIDE];
    for (int64_t o = begin; o < end; o += WIDE) {
        const int64_t wide = end - o < WIDE ? end - o : WIDE;
        float *work = p.work + p.start * p.rows + o;
        for (int64_t c = 0; c < p.count; c++) memcpy(tile[c], work + c * p.rows, wide * sizeof *work);
        for (int64_t c = 0; c < p.count; c++) {
            settle(p, p.order[p.start + c], o, wide, factor[c][c], tile[c]);
            memcpy(error, tile[c], sizeof error);
            for (int64_t k = c + 1; k < p.count; k++)
                for (int j = 0; j < WIDE; j++) tile[k][j] = tile[k][j] - factor[c][k] * error[j];
        }
        for (int64_t c = 0; c < p.count; c++) memcpy(work + c * p.rows, tile[c], wide * sizeof *work);
    }
}

}  // namespace

extern "C" void sqft_settle(const Leaf *p, int64_t threads) { share(settle_rows, p, p->rows, threads); }
