// What the evaluator computes: votes on pairs of responses and their sums over the pairs of each prompt, Kendall's tau-b of
// all pairs of models, and a bootstrap over prompts.
//
// Other threads of Python's may write into the arguments meanwhile: what is checked is what is used.

#pragma once

#include <cmath>

#include "cpu.hpp"
#include "parallel.hpp"

// int32 or int64 indices as they lie in memory.
struct Indices {
    const void *data;
    bool wide;
    Index operator[](Index i) const {
        return wide ? static_cast<const std::int64_t *>(data)[i] : static_cast<const std::int32_t *>(data)[i];
    }
    void prefetch(Index i) const { __builtin_prefetch(static_cast<const char *>(data) + i * (wide ? 8 : 4)); }
};

template <class T> struct Comparisons {
    const T *rewards;  // (members, responses)
    Indices a, b;      // (pairs,)
    Index members, responses, pairs;
};

struct PairSums {  // outputs, one row a prompt: of 1, members, or members * members entries
    Index *pairs, *decided, *ties;
    double *p, *p_p, *vote, *vote_p, *majority, *vote_vote, *disagreement;
};

// Index of the first NaN of values[0 .. count), or -1.
template <class T> Index find_nan(const T *values, Index count, Index threads);

// Twice the votes V_j, so that a tie is an integer too: 2 if a is preferred, 0 if b is, 1 where the rewards are equal; out
// (members, pairs). False where an index is out of range: then `out` means nothing.
template <class T> bool all_votes(const Comparisons<T> &comparisons, std::uint8_t *out);

// prompt_start (prompts + 1,) must be valid. False where an index or a fraction is out of range: then `sums` mean nothing.
template <class T>
bool sum_pairs(const Comparisons<T> &comparisons, const double *p, const Index *prompt_start, Index prompts, Path path,
               Index threads, const PairSums &sums);

// scores (models, prompts, n) without NaN, n < 2^31 -> taus (prompts, models, models). The path must be one this CPU has.
template <class T>
void all_taus(const T *scores, Index models, Index prompts, Index n, Path path, Index threads, double *taus);

// Sums over prompts drawn with replacement, the same ones on every machine: sums (prompts, columns), prompts < 2^31 -> totals
// (resamples, columns). The path must be one this CPU has.
void bootstrap(const double *sums, Index prompts, Index columns, Index resamples, std::uint64_t seed, Path path, Index threads,
               double *totals);
