// The counting behind evaluate.py: votes and their sums per prompt, Kendall's tau-b, bootstrap counts.
//
// Arguments are taken as they lie in memory, without a copy or a cast, and checked by hand: pybind11's own conversion
// would copy in silence, and its errors don't say which argument was wrong. Every check is made before the first result
// is computed. The GIL is released in the loops over data; nothing in them calls Python.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;
using Index = std::int64_t;

namespace {

// ---- arguments ----

// Scratch and (models, models) outputs are sized before data is read; this keeps their strides far from overflow.
constexpr Index max_models = 1024;

std::string shape_of(const py::array &array) { return py::str(array.attr("shape")); }

// `dtype` and `shape` are words for the messages, as in "float32" and "(members, responses)".
template <class T>
py::array_t<T> checked_array(const py::object &argument, const std::string &name, const std::string &dtype, Index ndim,
                             const std::string &shape) {
    const std::string wanted = name + " must be a numpy array of " + dtype;
    if (!py::isinstance<py::array>(argument))
        throw py::type_error(wanted + ", not " + std::string(py::str(py::type::of(argument).attr("__name__"))));
    const auto array = py::reinterpret_borrow<py::array>(argument);
    if (!py::isinstance<py::array_t<T>>(array)) throw py::type_error(wanted + ", not " + std::string(py::str(array.dtype())));
    if (array.ndim() != ndim) throw py::value_error(name + " must have shape " + shape + ", not " + shape_of(array));
    const bool contiguous = array.flags() & py::array::c_style;
    const bool aligned = reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) == 0;
    if (!contiguous || !aligned)
        throw py::value_error(name + " must be C-contiguous and aligned (numpy.ascontiguousarray), not a strided view of shape " +
                              shape_of(array));
    return py::reinterpret_borrow<py::array_t<T>>(array);
}

void check_models(Index models, const std::string &name, const py::array &array) {
    if (models < 1 || models > max_models)
        throw py::value_error(name + " must hold 1 to " + std::to_string(max_models) + " models, not shape " + shape_of(array));
}

void check_length(const py::array &array, const std::string &name, Index length, const std::string &same_as) {
    if (array.shape(0) != length)
        throw py::value_error(name + " must have shape (" + std::to_string(length) + ",) as " + same_as + ", not " +
                              shape_of(array));
}

std::uint64_t checked_integer(const py::object &argument, const std::string &name, std::uint64_t largest) {
    const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(argument.ptr()));
    if (!integer) {
        PyErr_Clear();
        throw py::type_error(name + " must be an integer, not " +
                             std::string(py::str(py::type::of(argument).attr("__name__"))));
    }
    const std::uint64_t value = PyLong_AsUnsignedLongLong(integer.ptr());
    const bool overflow = PyErr_Occurred();
    PyErr_Clear();
    if (overflow || value > largest)
        throw py::value_error(name + " must be from 0 to " + std::to_string(largest) + ", not " +
                              std::string(py::str(integer)));
    return value;
}

// ---- votes ----

// Rewards and the pairs of responses to compare, checked: every index is in range and no reward is NaN.
struct Comparisons {
    py::array_t<float> rewards_array;  // owned here, so that the pointers below stay valid
    py::array_t<Index> a_array, b_array;
    const float *rewards;
    const Index *a, *b;
    Index members, responses, pairs;

    Comparisons(const py::object &rewards_argument, const py::object &a_argument, const py::object &b_argument)
        : rewards_array(checked_array<float>(rewards_argument, "rewards", "float32", 2, "(members, responses)")),
          a_array(checked_array<Index>(a_argument, "a", "int64", 1, "(pairs,)")),
          b_array(checked_array<Index>(b_argument, "b", "int64", 1, "(pairs,)")),
          rewards(rewards_array.data()), a(a_array.data()), b(b_array.data()), members(rewards_array.shape(0)),
          responses(rewards_array.shape(1)), pairs(a_array.shape(0)) {
        check_models(members, "rewards", rewards_array);
        check_length(b_array, "b", pairs, "a");
        py::gil_scoped_release release;
        for (Index i = 0; i < members * responses; ++i)
            if (std::isnan(rewards[i]))
                throw py::value_error("rewards must not be NaN, but is for member " + std::to_string(i / responses + 1) +
                                      " (counted from 1), response " + std::to_string(i % responses));
        check_indices(a, "a");
        check_indices(b, "b");
    }

    void check_indices(const Index *indices, const std::string &name) const {
        for (Index i = 0; i < pairs; ++i)
            if (indices[i] < 0 || indices[i] >= responses)
                throw py::value_error(name + " must index the " + std::to_string(responses) + " responses, but " + name +
                                      "[" + std::to_string(i) + "] is " + std::to_string(indices[i]));
    }

    // Twice the vote V_j, so that a tie is an integer too: 2 if a is preferred, 0 if b is, 1 on an exact float32 tie.
    int half_votes(Index member, Index pair) const {
        const float *reward = rewards + member * responses;
        const float on_a = reward[a[pair]], on_b = reward[b[pair]];
        return 1 + (on_a > on_b) - (on_a < on_b);
    }
};

py::array_t<std::uint8_t> votes(const py::object &rewards, const py::object &a, const py::object &b) {
    const Comparisons comparisons(rewards, a, b);
    py::array_t<std::uint8_t> result({comparisons.members, comparisons.pairs});
    std::uint8_t *out = result.mutable_data();
    py::gil_scoped_release release;
    for (Index member = 0; member < comparisons.members; ++member)
        for (Index pair = 0; pair < comparisons.pairs; ++pair)
            *out++ = static_cast<std::uint8_t>(comparisons.half_votes(member, pair));
    return result;
}

// ---- sums over the pairs of each prompt ----

void check_fractions(const double *p, Index pairs) {
    for (Index i = 0; i < pairs; ++i)
        if (!(p[i] >= 0 && p[i] <= 1)) {  // also catches NaN
            char value[32];
            std::snprintf(value, sizeof value, "%.17g", p[i]);
            throw py::value_error("p must be in [0, 1], but p[" + std::to_string(i) + "] is " + value);
        }
}

void check_prompt_start(const Index *start, Index prompts, Index pairs) {
    if (start[0] != 0) throw py::value_error("prompt_start must begin with 0, not " + std::to_string(start[0]));
    for (Index i = 0; i < prompts; ++i)
        if (start[i + 1] < start[i])
            throw py::value_error("prompt_start must not decrease, but prompt_start[" + std::to_string(i + 1) + "] is " +
                                  std::to_string(start[i + 1]) + " after " + std::to_string(start[i]));
    if (start[prompts] != pairs)
        throw py::value_error("prompt_start must end with the number of pairs, " + std::to_string(pairs) + ", not " +
                              std::to_string(start[prompts]));
}

// O(pairs * k^2). An exact float32 tie is half a vote; infinities are ordinary values.
// Sums without p are integers in half or quarter votes until the end, so they are exact. Sums with p add doubles in the
// order of the pairs within one prompt, so a prompt's row does not depend on the other prompts.
py::dict pair_statistics(const py::object &rewards, const py::object &a, const py::object &b,
                         const py::object &p_argument, const py::object &prompt_start_argument) {
    const Comparisons comparisons(rewards, a, b);
    const auto p_array = checked_array<double>(p_argument, "p", "float64", 1, "(pairs,)");
    const auto start_array = checked_array<Index>(prompt_start_argument, "prompt_start", "int64", 1, "(prompts + 1,)");
    check_length(p_array, "p", comparisons.pairs, "a");
    if (start_array.shape(0) < 1) throw py::value_error("prompt_start must have shape (prompts + 1,), not (0,)");
    const double *p = p_array.data();
    const Index *start = start_array.data();
    const Index k = comparisons.members, prompts = start_array.shape(0) - 1;
    {
        py::gil_scoped_release release;
        check_fractions(p, comparisons.pairs);
        check_prompt_start(start, prompts, comparisons.pairs);
    }

    py::array_t<Index> pairs(prompts), decided(prompts), ties({prompts, k});
    py::array_t<double> p_sum(prompts), p_p(prompts), vote({prompts, k}), vote_p({prompts, k}), majority({prompts, k});
    py::array_t<double> vote_vote({prompts, k, k}), disagreement({prompts, k, k});
    Index *pairs_out = pairs.mutable_data(), *decided_out = decided.mutable_data(), *ties_out = ties.mutable_data();
    double *p_out = p_sum.mutable_data(), *p_p_out = p_p.mutable_data(), *vote_out = vote.mutable_data();
    double *vote_p_out = vote_p.mutable_data(), *majority_out = majority.mutable_data();
    double *vote_vote_out = vote_vote.mutable_data(), *disagreement_out = disagreement.mutable_data();
    {
        py::gil_scoped_release release;
        std::vector<int> half(k);
        std::vector<Index> tied(k), halves(k), majority_halves(k), quarters(k * k), half_differences(k * k);
        std::vector<double> half_votes_p(k);
        for (Index prompt = 0; prompt < prompts; ++prompt) {
            for (auto *sums : {&tied, &halves, &majority_halves, &quarters, &half_differences})
                std::fill(sums->begin(), sums->end(), 0);
            std::fill(half_votes_p.begin(), half_votes_p.end(), 0.0);
            Index decided_pairs = 0;
            double sum_p = 0, sum_p_p = 0;
            for (Index pair = start[prompt]; pair < start[prompt + 1]; ++pair) {
                const double fraction = p[pair];
                sum_p += fraction;
                sum_p_p += fraction * fraction;
                decided_pairs += fraction != 0.5;
                for (Index j = 0; j < k; ++j) {
                    half[j] = comparisons.half_votes(j, pair);
                    tied[j] += half[j] == 1;
                    halves[j] += half[j];
                    half_votes_p[j] += half[j] * fraction;
                    if (fraction != 0.5) majority_halves[j] += fraction > 0.5 ? half[j] : 2 - half[j];
                    for (Index i = 0; i <= j; ++i) {
                        quarters[j * k + i] += half[i] * half[j];
                        half_differences[j * k + i] += std::abs(half[i] - half[j]);
                    }
                }
            }
            pairs_out[prompt] = start[prompt + 1] - start[prompt];
            decided_out[prompt] = decided_pairs;
            p_out[prompt] = sum_p;
            p_p_out[prompt] = sum_p_p;
            for (Index j = 0; j < k; ++j) {
                *ties_out++ = tied[j];
                *vote_out++ = 0.5 * halves[j];
                *vote_p_out++ = 0.5 * half_votes_p[j];
                *majority_out++ = 0.5 * majority_halves[j];
                for (Index i = 0; i < k; ++i) {
                    const Index lower = std::max(i, j) * k + std::min(i, j);  // only the lower triangle was summed
                    *vote_vote_out++ = 0.25 * quarters[lower];
                    *disagreement_out++ = 0.5 * half_differences[lower];
                }
            }
        }
    }
    py::dict result;
    result["pairs"] = pairs;
    result["decided"] = decided;
    result["p"] = p_sum;
    result["p_p"] = p_p;
    result["vote"] = vote;
    result["vote_p"] = vote_p;
    result["majority"] = majority;
    result["ties"] = ties;
    result["vote_vote"] = vote_vote;
    result["disagreement"] = disagreement;
    return result;
}

// ---- Kendall's tau-b ----

// One model's ranking of the n continuations of one prompt.
struct Ranking {
    std::vector<Index> order;        // continuations by increasing score
    std::vector<Index> rank;         // of each continuation, from 0; equal scores share a rank
    std::vector<Index> group_start;  // where each rank begins in `order`
    Index tied_pairs;                // pairs of continuations with equal scores

    template <class T> void assign(const T *scores, Index n) {
        order.resize(n);
        rank.resize(n);
        group_start.clear();
        tied_pairs = 0;
        for (Index i = 0; i < n; ++i) order[i] = i;
        std::sort(order.begin(), order.end(), [scores](Index i, Index j) { return scores[i] < scores[j]; });
        for (Index i = 0; i < n; ++i) {
            if (i == 0 || scores[order[i]] != scores[order[i - 1]]) group_start.push_back(i);
            rank[order[i]] = static_cast<Index>(group_start.size()) - 1;
            tied_pairs += i - group_start.back();
        }
    }
};

// Pairs out of order in `values`, by bottom-up merge sort: O(n log n). Equal values are in order. `values` ends up sorted.
Index count_inversions(std::vector<Index> &values, std::vector<Index> &buffer) {
    const Index n = static_cast<Index>(values.size());
    Index inversions = 0;
    for (Index width = 1; width < n; width *= 2) {
        for (Index begin = 0; begin < n; begin += 2 * width) {
            const Index middle = std::min(begin + width, n), end = std::min(begin + 2 * width, n);
            Index left = begin, right = middle;
            for (Index out = begin; out < end; ++out) {
                if (right == end || (left < middle && values[left] <= values[right])) {
                    buffer[out] = values[left++];
                } else {
                    inversions += middle - left;  // all that is left on the left exceeds this value
                    buffer[out] = values[right++];
                }
            }
        }
        values.swap(buffer);
    }
    return inversions;
}

struct KendallScratch {
    std::vector<Index> next, sorted, buffer;
};

// Concordant minus discordant pairs. Knight (1966), O(n log n): sort by (x, y), then the inversions left in y are the
// discordant pairs. Ties: a pair tied in x or in y is neither; sorting ties of x by y keeps them from being inversions.
Index concordant_minus_discordant(const Ranking &x, const Ranking &y, KendallScratch &scratch) {
    const Index n = static_cast<Index>(x.order.size());
    scratch.next = x.group_start;
    scratch.sorted.resize(n);
    scratch.buffer.resize(n);
    // y's order dealt into x's groups is the sort by (x, y), in O(n)
    for (const Index item : y.order) scratch.sorted[scratch.next[x.rank[item]]++] = y.rank[item];
    Index tied_in_both = 0, run = 0;
    for (Index i = 1; i < n; ++i) {
        const bool same = scratch.sorted[i] == scratch.sorted[i - 1] && x.rank[x.order[i]] == x.rank[x.order[i - 1]];
        run = same ? run + 1 : 0;
        tied_in_both += run;
    }
    const Index discordant = count_inversions(scratch.sorted, scratch.buffer);
    const Index total = n * (n - 1) / 2;
    return total - x.tied_pairs - y.tied_pairs + tied_in_both - 2 * discordant;
}

template <class T> py::array_t<double> kendall_tau_of(const py::object &argument) {
    const auto scores_array =
        checked_array<T>(argument, "scores", "float32 or float64", 3, "(models, prompts, continuations)");
    const Index k = scores_array.shape(0), prompts = scores_array.shape(1), n = scores_array.shape(2);
    check_models(k, "scores", scores_array);
    const T *scores = scores_array.data();
    {
        py::gil_scoped_release release;
        for (Index i = 0; i < k * prompts * n; ++i)
            if (std::isnan(scores[i]))
                throw py::value_error("scores must not be NaN, but is for model " + std::to_string(i / n / prompts + 1) +
                                      " (counted from 1), prompt " + std::to_string(i / n % prompts) + ", index " +
                                      std::to_string(i % n));
    }

    py::array_t<double> result({prompts, k, k});
    double *out = result.mutable_data();
    py::gil_scoped_release release;
    std::vector<Ranking> rankings(k);
    KendallScratch scratch;
    for (Index prompt = 0; prompt < prompts; ++prompt, out += k * k) {
        const Index total = n * (n - 1) / 2;
        std::fill(out, out + k * k, std::numeric_limits<double>::quiet_NaN());
        for (Index j = 0; j < k; ++j) rankings[j].assign(scores + (j * prompts + prompt) * n, n);
        for (Index i = 0; i < k; ++i) {
            if (rankings[i].tied_pairs == total) continue;  // constant, or n < 2: undefined
            out[i * k + i] = 1;
            for (Index j = 0; j < i; ++j) {
                if (rankings[j].tied_pairs == total) continue;
                const double difference = concordant_minus_discordant(rankings[i], rankings[j], scratch);
                const double root_i = std::sqrt(total - rankings[i].tied_pairs);
                const double root_j = std::sqrt(total - rankings[j].tied_pairs);
                // Two divisions, first by x's root, then clipped: as scipy does it, to the last bit. That bit can depend on
                // which of the two is x.
                out[i * k + j] = std::clamp(difference / root_i / root_j, -1.0, 1.0);
                out[j * k + i] = std::clamp(difference / root_j / root_i, -1.0, 1.0);
            }
        }
    }
    return result;
}

py::array_t<double> kendall_tau(const py::object &scores) {
    return py::isinstance<py::array_t<double>>(scores) ? kendall_tau_of<double>(scores) : kendall_tau_of<float>(scores);
}

// ---- bootstrap ----

// splitmix64 (Steele, Lea, Flood 2014): a Weyl sequence and a bijective mixer, defined by integer arithmetic alone.
std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

struct SplitMix64 {
    std::uint64_t state;
    std::uint32_t next32() { return static_cast<std::uint32_t>(mix(state += 0x9e3779b97f4a7c15u) >> 32); }

    // Unbiased, from 0 to bound - 1: Lemire (2019), "Fast random integer generation in an interval".
    std::uint32_t below(std::uint32_t bound) {
        std::uint64_t product = std::uint64_t{next32()} * bound;
        if (static_cast<std::uint32_t>(product) < bound) {
            const std::uint32_t threshold = (0u - bound) % bound;  // 2^32 mod bound
            while (static_cast<std::uint32_t>(product) < threshold) product = std::uint64_t{next32()} * bound;
        }
        return static_cast<std::uint32_t>(product >> 32);
    }
};

// O(resamples * prompts). Each resample has a generator of its own, started from (seed, resample), so that its counts
// depend on neither the number of resamples nor the order in which they are drawn.
py::array_t<std::int32_t> bootstrap_counts(const py::object &prompts_argument, const py::object &resamples_argument,
                                           const py::object &seed_argument) {
    constexpr std::uint64_t largest_int32 = std::numeric_limits<std::int32_t>::max();
    const std::uint64_t prompts = checked_integer(prompts_argument, "prompts", largest_int32);
    const std::uint64_t resamples = checked_integer(resamples_argument, "resamples", largest_int32);
    const std::uint64_t seed = checked_integer(seed_argument, "seed", std::numeric_limits<std::uint64_t>::max());
    py::array_t<std::int32_t> result({resamples, prompts});
    std::int32_t *counts = result.mutable_data();
    py::gil_scoped_release release;
    std::fill(counts, counts + resamples * prompts, 0);
    for (std::uint64_t resample = 0; resample < resamples; ++resample, counts += prompts) {
        SplitMix64 generator{mix(mix(seed) + resample)};
        for (std::uint64_t draw = 0; draw < prompts; ++draw)
            ++counts[generator.below(static_cast<std::uint32_t>(prompts))];
    }
    return result;
}

}  // namespace

// ---- Python ----

PYBIND11_MODULE(evaluator, module) {
    // The signatures are written below, with dtypes; pybind11's would say "object". "--" is what Python's own parser of
    // docstring signatures expects.
    py::options options;
    options.disable_function_signatures();

    module.doc() = "Exact, seeded counting for evaluation: votes, sums per prompt, Kendall's tau-b, bootstrap counts.";

    module.def("pair_statistics", &pair_statistics, py::arg("rewards"), py::arg("a"), py::arg("b"), py::arg("p"),
               py::arg("prompt_start"), R"(pair_statistics(rewards, a, b, p, prompt_start)
--

Sums over the pairs of each prompt, from which every pair metric, for any weights and any bootstrap over prompts, follows.

rewards       float32 (k, responses), C-contiguous; k from 1 to 1024, inf allowed, no NaN
a, b          int64 (pairs,), the two responses of each pair, 0 to responses - 1; pairs lie prompt by prompt
p             float64 (pairs,), fraction of the annotators that prefer a, in [0, 1]
prompt_start  int64 (prompts + 1,), from 0 to pairs, not decreasing: prompt i has the pairs prompt_start[i]:prompt_start[i+1]

With V_j = 1 if member j's reward is higher on a, 0 if on b, 1/2 where they are exactly equal, a dict of

pairs         int64 (prompts,)            number of pairs
decided       int64 (prompts,)            pairs with p != 1/2
ties          int64 (prompts, k)          pairs with V_j = 1/2
p, p_p        float64 (prompts,)          sum p, sum p^2
vote          float64 (prompts, k)        sum V_j
vote_p        float64 (prompts, k)        sum V_j p
vote_vote     float64 (prompts, k, k)     sum V_i V_j
disagreement  float64 (prompts, k, k)     sum |V_i - V_j|
majority      float64 (prompts, k)        over decided pairs, sum of 1 if V_j sides with the majority, 1/2 if V_j = 1/2

All but p, p_p and vote_p are exact. Summed over prompts, with weights alpha and p_hat = sum_j alpha_j V_j (section 2 of
the paper, where a tie is not considered):

Brier score, mean (p_hat - p)^2 (section 5, appendix E)   (alpha' vote_vote alpha - 2 alpha' vote_p + p_p) / pairs
disagreement score Phi_j (section 2)                      (vote_j + p - 2 vote_p_j) / pairs
regret of member j (appendix E; 1/2 at V_j = 1/2)         Phi_j - mean min(p, 1 - p)
accuracy of member j (appendix E)                         majority_j / decided

Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, a view that is not C-contiguous, NaN, an index
or a fraction out of range, or a wrong prompt_start; the message names the argument, what it is and what it should be.)");

    module.def("votes", &votes, py::arg("rewards"), py::arg("a"), py::arg("b"), R"(votes(rewards, a, b)
--

Each member's vote on each pair, in half votes: uint8 (k, pairs), 2 where a has the higher reward, 0 where b has, 1 where
the two float32 rewards are exactly equal. Half of it is the indicator in the paper's p_hat (section 2).

rewards  float32 (k, responses), C-contiguous; k from 1 to 1024, inf allowed, no NaN
a, b     int64 (pairs,), the two responses of each pair, 0 to responses - 1

Raises TypeError and ValueError as pair_statistics does.)");

    module.def("kendall_tau", &kendall_tau, py::arg("scores"), R"(kendall_tau(scores)
--

Kendall's tau-b of every two models' rankings of the continuations, prompt by prompt: float64 (prompts, k, k), each from
-1 to 1. The paper's figure 3 is its mean over prompts.

scores  float32 or float64 (k, prompts, n), C-contiguous; k from 1 to 1024, inf allowed, no NaN

Equal scores, inf and inf, and -0.0 and 0.0 are ties. [i, j] with i != j equals scipy.stats.kendalltau(scores[i, prompt],
scores[j, prompt]).statistic in every bit (so [j, i] can differ from it in the last one); the diagonal is 1. A model that
scores all n alike, and n < 2, have nan in their row and column. O(k^2 n log n) a prompt.

Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, a view that is not C-contiguous, and NaN, with
its model (counted from 1), prompt and index.)");

    module.def("bootstrap_counts", &bootstrap_counts, py::arg("prompts"), py::arg("resamples"), py::arg("seed"),
               R"(bootstrap_counts(prompts, resamples, seed)
--

How often each prompt occurs when `prompts` prompts are drawn with replacement: int32 (resamples, prompts), each row with
the sum `prompts`. Times pair_statistics' sums it gives the resampled sums of a bootstrap over prompts (ours; the paper
reports no intervals).

prompts, resamples  integers from 0 to 2^31 - 1
seed                integer from 0 to 2^64 - 1

The counts are the same on every machine, and resample i is the same however many are asked for: it is drawn by
splitmix64 with the state mix(mix(seed) + i), mix being its output function; a prompt is drawn from the upper 32 bits of
an output by Lemire's unbiased method.

Raises TypeError for an argument that is not an integer, ValueError for one out of range.)");
}
