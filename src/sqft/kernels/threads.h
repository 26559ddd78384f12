// A range of rows shared among the threads of the OpenMP runtime that PyTorch has loaded: they are waiting anyway, and
// a second pool would fight them. Where there is none, one thread does it.

#pragma once

#include <cstdint>

extern "C" {
void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) __attribute__((weak));
int omp_get_thread_num() __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
}

namespace {

typedef void (*Rows)(const void *job, int64_t begin, int64_t end);

struct Shared {
    Rows rows;
    const void *job;
    int64_t count;
};

void one_share(void *data) {
    const Shared &s = *(const Shared *)data;
    int64_t mine = omp_get_thread_num(), of = omp_get_num_threads();
    s.rows(s.job, s.count * mine / of, s.count * (mine + 1) / of);
}

void share(Rows rows, const void *job, int64_t count, int64_t threads) {
    Shared shared{rows, job, count};
    if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads)
        GOMP_parallel(one_share, &shared, (unsigned)threads, 0);
    else
        rows(job, 0, count);
}

}  // namespace
