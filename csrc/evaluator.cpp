// The counting behind evaluate.py: votes and their sums per prompt, Kendall's tau-b, bootstrap sums.
//
// Arguments are taken as they lie in memory, without a copy or a cast, and checked by hand: pybind11's own conversion
// would copy in silence, and its errors don't say which argument was wrong. Nothing is returned before every check has been
// made. The GIL is released in the loops over data; nothing in them calls Python.

#include <cstdio>
#include <limits>
#include <string>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "evaluator.hpp"

namespace py = pybind11;

namespace {

// ---- arguments ----

// Scratch and (models, models) outputs are sized before data is read; this keeps their strides far from overflow.
constexpr Index max_models = 1024;
constexpr std::uint64_t largest_int32 = std::numeric_limits<std::int32_t>::max();

std::string shape_of(const py::array &array) { return py::str(array.attr("shape")); }
std::string type_of(const py::object &argument) { return py::str(py::type::of(argument).attr("__name__")); }

template <class T> std::string dtype_name() { return py::str(py::dtype::of<T>()); }

template <class T> bool holds(const py::array &array) { return py::isinstance<py::array_t<T>>(array); }
template <class T> const T *data_of(const py::array &array) { return static_cast<const T *>(array.data()); }
Indices indices_of(const py::array &array) { return {array.data(), holds<std::int64_t>(array)}; }

// A C-contiguous array of one of two dtypes; `shape` is words for the messages, as in "(members, responses)".
template <class T, class Other>
py::array checked_array(const py::object &argument, const std::string &name, Index ndim, const std::string &shape) {
    const auto refuse = [&](const std::string &type) {
        const std::string other = std::is_same_v<T, Other> ? "" : " or " + dtype_name<Other>();
        throw py::type_error(name + " must be a numpy array of " + dtype_name<T>() + other + ", not " + type);
    };
    if (!py::isinstance<py::array>(argument)) refuse(type_of(argument));
    const auto array = py::reinterpret_borrow<py::array>(argument);
    if (!holds<T>(array) && !holds<Other>(array)) refuse(py::str(array.dtype()));
    if (array.ndim() != ndim) throw py::value_error(name + " must have shape " + shape + ", not " + shape_of(array));
    const bool aligned = reinterpret_cast<std::uintptr_t>(array.data()) % array.itemsize() == 0;
    if (!(array.flags() & py::array::c_style) || !aligned)
        throw py::value_error(name + " must be C-contiguous and aligned (numpy.ascontiguousarray), not a strided view of " +
                              "shape " + shape_of(array));
    return array;
}

void check_models(Index models, const std::string &name, const py::array &array) {
    if (models < 1 || models > max_models)
        throw py::value_error(name + " must hold 1 to " + std::to_string(max_models) + " models, not shape " +
                              shape_of(array));
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
        throw py::type_error(name + " must be an integer, not " + type_of(argument));
    }
    const std::uint64_t value = PyLong_AsUnsignedLongLong(integer.ptr());
    const bool overflow = PyErr_Occurred();
    PyErr_Clear();
    if (overflow || value > largest)
        throw py::value_error(name + " must be from 0 to " + std::to_string(largest) + ", not " +
                              std::string(py::str(integer)));
    return value;
}

Index checked_threads(const py::object &argument) { return static_cast<Index>(checked_integer(argument, "threads", 1024)); }

// The path of that name, if this CPU has it.
Path checked_path(const py::object &argument) {
    std::vector<std::pair<std::string, Path>> paths = {{"auto", Path::automatic}, {"portable", Path::portable}};
    if (cpu_has_avx2()) paths.emplace_back("avx2", Path::avx2);
    if (cpu_has_avx512()) paths.emplace_back("avx512", Path::avx512);
    std::string names;
    for (const auto &[name, path] : paths) names += (names.empty() ? "\"" : ", \"") + name + "\"";
    const std::string wanted = "path must be one of " + names + " on this CPU, not ";
    if (!py::isinstance<py::str>(argument)) throw py::type_error(wanted + type_of(argument));
    const auto given = argument.cast<std::string>();
    for (const auto &[name, path] : paths)
        if (name == given) return path;
    throw py::value_error(wanted + "\"" + given + "\"");
}

// ---- votes ----

// Rewards and the pairs of responses to compare. Shapes and dtypes are checked here.
struct PairArguments {
    py::array rewards, a, b;
    Index members, responses, pairs;

    PairArguments(const py::object &rewards_argument, const py::object &a_argument, const py::object &b_argument)
        : rewards(checked_array<float, double>(rewards_argument, "rewards", 2, "(members, responses)")),
          a(checked_array<std::int64_t, std::int32_t>(a_argument, "a", 1, "(pairs,)")),
          b(checked_array<std::int64_t, std::int32_t>(b_argument, "b", 1, "(pairs,)")), members(rewards.shape(0)),
          responses(rewards.shape(1)), pairs(a.shape(0)) {
        check_models(members, "rewards", rewards);
        if (responses > static_cast<Index>(largest_int32))
            throw py::value_error("rewards must hold fewer than 2^31 responses, not shape " + shape_of(rewards));
        check_length(b, "b", pairs, "a");
    }

    template <class T> Comparisons<T> comparisons() const {
        return {data_of<T>(rewards), indices_of(a), indices_of(b), members, responses, pairs};
    }

    // f(Comparisons<T>) with the rewards' T.
    template <class F> auto visit(const F &f) const {
        return holds<float>(rewards) ? f(comparisons<float>()) : f(comparisons<double>());
    }
};

template <class T> void check_rewards(const Comparisons<T> &in, Index threads) {
    const Index i = find_nan(in.rewards, in.members * in.responses, threads);
    if (i >= 0)
        throw py::value_error("rewards must not be NaN, but is for member " + std::to_string(i / in.responses + 1) +
                              " (counted from 1), response " + std::to_string(i % in.responses));
}

template <class T> void check_indices(const Comparisons<T> &in, const Indices &indices, const std::string &name) {
    for (Index i = 0; i < in.pairs; ++i)
        if (indices[i] < 0 || indices[i] >= in.responses)
            throw py::value_error(name + " must index the " + std::to_string(in.responses) + " responses, but " + name +
                                  "[" + std::to_string(i) + "] is " + std::to_string(indices[i]));
}

void check_fractions(const double *p, Index pairs) {
    for (Index i = 0; i < pairs; ++i)
        if (!(p[i] >= 0 && p[i] <= 1)) {  // also catches NaN
            char value[32];
            std::snprintf(value, sizeof value, "%.17g", p[i]);
            throw py::value_error("p must be in [0, 1], but p[" + std::to_string(i) + "] is " + value);
        }
}

// What was out of range in a loop over the pairs?
template <class T> void refuse_pairs(const Comparisons<T> &in, const double *p) {
    const IeeeArithmetic arithmetic;
    check_indices(in, in.a, "a");
    check_indices(in, in.b, "b");
    if (p) check_fractions(p, in.pairs);
    throw py::value_error(std::string(p ? "a, b or p" : "a or b") + " was changed during the call");
}

py::array_t<std::uint8_t> votes(const py::object &rewards, const py::object &a, const py::object &b) {
    const PairArguments arguments(rewards, a, b);
    py::array_t<std::uint8_t> result({arguments.members, arguments.pairs});
    arguments.visit([&](const auto &in) {
        std::uint8_t *out = result.mutable_data();
        py::gil_scoped_release release;
        check_rewards(in, 1);
        if (!all_votes(in, out)) refuse_pairs(in, nullptr);
    });
    return result;
}

// ---- sums over the pairs of each prompt ----

void check_prompt_start(const std::vector<Index> &start, Index pairs) {
    const Index prompts = static_cast<Index>(start.size()) - 1;
    if (start[0] != 0) throw py::value_error("prompt_start must begin with 0, not " + std::to_string(start[0]));
    for (Index i = 0; i < prompts; ++i)
        if (start[i + 1] < start[i])
            throw py::value_error("prompt_start must not decrease, but prompt_start[" + std::to_string(i + 1) + "] is " +
                                  std::to_string(start[i + 1]) + " after " + std::to_string(start[i]));
    if (start[prompts] != pairs)
        throw py::value_error("prompt_start must end with the number of pairs, " + std::to_string(pairs) + ", not " +
                              std::to_string(start[prompts]));
}

// O(pairs * k^2). An exact tie is half a vote; infinities are ordinary values.
py::dict pair_statistics(const py::object &rewards, const py::object &a, const py::object &b, const py::object &p_argument,
                         const py::object &prompt_start_argument, const py::object &path_argument,
                         const py::object &threads_argument) {
    const PairArguments arguments(rewards, a, b);
    const auto p_array = checked_array<double, double>(p_argument, "p", 1, "(pairs,)");
    const auto start_array = checked_array<Index, Index>(prompt_start_argument, "prompt_start", 1, "(prompts + 1,)");
    check_length(p_array, "p", arguments.pairs, "a");
    if (start_array.shape(0) < 1) throw py::value_error("prompt_start must have shape (prompts + 1,), not (0,)");
    const Path path = checked_path(path_argument);
    const Index threads = checked_threads(threads_argument);
    const double *p = data_of<double>(p_array);
    const std::vector<Index> start(data_of<Index>(start_array), data_of<Index>(start_array) + start_array.shape(0));
    const Index k = arguments.members, prompts = start_array.shape(0) - 1;

    py::dict result;
    const auto output = [&](const char *name, auto zero, std::vector<Index> shape) {
        py::array_t<decltype(zero)> array(shape);
        result[name] = array;
        return array.mutable_data();
    };
    const PairSums sums = {
        output("pairs", Index{}, {prompts}),      output("decided", Index{}, {prompts}),
        output("ties", Index{}, {prompts, k}),    output("p", 0.0, {prompts}),
        output("p_p", 0.0, {prompts}),            output("vote", 0.0, {prompts, k}),
        output("vote_p", 0.0, {prompts, k}),      output("majority", 0.0, {prompts, k}),
        output("vote_vote", 0.0, {prompts, k, k}), output("disagreement", 0.0, {prompts, k, k})};
    arguments.visit([&](const auto &in) {
        py::gil_scoped_release release;
        check_rewards(in, threads);
        check_prompt_start(start, in.pairs);
        if (!sum_pairs(in, p, start.data(), prompts, path, threads, sums)) refuse_pairs(in, p);
    });
    return result;
}

// ---- Kendall's tau-b ----

py::array_t<double> kendall_tau(const py::object &argument, const py::object &path_argument,
                                const py::object &threads_argument) {
    const auto array = checked_array<float, double>(argument, "scores", 3, "(models, prompts, continuations)");
    const Index k = array.shape(0), prompts = array.shape(1), n = array.shape(2);
    check_models(k, "scores", array);
    if (n > std::numeric_limits<std::int32_t>::max())
        throw py::value_error("scores must hold fewer than 2^31 continuations, not shape " + shape_of(array));
    const Path path = checked_path(path_argument);
    const Index threads = checked_threads(threads_argument);
    py::array_t<double> result({prompts, k, k});
    double *taus = result.mutable_data();
    const auto compute = [=](const auto *scores) {
        py::gil_scoped_release release;
        const Index i = find_nan(scores, k * prompts * n, threads);
        if (i >= 0)
            throw py::value_error("scores must not be NaN, but is for model " + std::to_string(i / n / prompts + 1) +
                                  " (counted from 1), prompt " + std::to_string(i / n % prompts) + ", index " +
                                  std::to_string(i % n));
        all_taus(scores, k, prompts, n, path, threads, taus);
    };
    holds<float>(array) ? compute(data_of<float>(array)) : compute(data_of<double>(array));
    return result;
}

// ---- bootstrap ----

py::array_t<double> bootstrap_sums(const py::object &sums_argument, const py::object &resamples_argument,
                                   const py::object &seed_argument, const py::object &path_argument,
                                   const py::object &threads_argument) {
    const auto array = checked_array<double, double>(sums_argument, "sums", 2, "(prompts, columns)");
    const Index prompts = array.shape(0), columns = array.shape(1);
    if (prompts > static_cast<Index>(largest_int32))
        throw py::value_error("sums must hold fewer than 2^31 prompts, not shape " + shape_of(array));
    const Index resamples = checked_integer(resamples_argument, "resamples", largest_int32);
    const std::uint64_t seed = checked_integer(seed_argument, "seed", ~std::uint64_t{0});
    const Path path = checked_path(path_argument);
    const Index threads = checked_threads(threads_argument);
    py::array_t<double> result({resamples, columns});
    double *totals = result.mutable_data();
    py::gil_scoped_release release;
    bootstrap(data_of<double>(array), prompts, columns, resamples, seed, path, threads, totals);
    return result;
}

}  // namespace

// ---- Python ----

PYBIND11_MODULE(evaluator, module) {
    // The signatures are written below, with dtypes; pybind11's would say "object". "--" is what Python's own parser of
    // docstring signatures expects.
    py::options options;
    options.disable_function_signatures();

    module.doc() = "Exact, seeded counting for evaluation: votes, sums per prompt, Kendall's tau-b, bootstrap sums.";

    module.def("pair_statistics", &pair_statistics, py::arg("rewards"), py::arg("a"), py::arg("b"), py::arg("p"),
               py::arg("prompt_start"), py::arg("path") = "auto", py::arg("threads") = 0,
               R"(pair_statistics(rewards, a, b, p, prompt_start, path="auto", threads=0)
--

Sums over the pairs of each prompt, from which every pair metric, for any weights and any bootstrap over prompts, follows.

rewards       float32 or float64 (k, responses), C-contiguous; k from 1 to 1024, inf allowed, no NaN
a, b          int64 or int32 (pairs,), the two responses of each pair, 0 to responses - 1; pairs lie prompt by prompt
p             float64 (pairs,), fraction of the annotators that prefer a, in [0, 1]
prompt_start  int64 (prompts + 1,), from 0 to pairs, not decreasing: prompt i has the pairs from prompt_start[i] to
              prompt_start[i + 1] - 1; [0, pairs] gives the sums over all pairs, faster than adding up those of prompts
path          "auto", "portable" or, where the CPU has it, "avx2" or "avx512": the same result to the last bit
threads       0 to 1024; 0 is as many as pay. The result is the same for any number

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

All but p, p_p and vote_p are exact; these are added pair by pair, a prompt of more than 16,384 pairs in pieces of so many. A
prompt's row does not depend on other prompts. Nothing is copied but a few pairs at a time. Summed over prompts, with weights
alpha and p_hat = sum_j alpha_j V_j (section 2 of the paper, where a tie is not considered):

Brier score, mean (p_hat - p)^2 (section 5, appendix E)   (alpha' vote_vote alpha - 2 alpha' vote_p + p_p) / pairs
disagreement score Phi_j (section 2)                      (vote_j + p - 2 vote_p_j) / pairs
regret of member j (appendix E; 1/2 at V_j = 1/2)         Phi_j - mean min(p, 1 - p)
accuracy of member j (appendix E)                         majority_j / decided

Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, a view that is not C-contiguous, NaN, an index
or a fraction out of range, or a wrong prompt_start; the message names the argument, what it is and what it should be.)");

    module.def("votes", &votes, py::arg("rewards"), py::arg("a"), py::arg("b"), R"(votes(rewards, a, b)
--

Each member's vote on each pair, in half votes: uint8 (k, pairs), 2 where a has the higher reward, 0 where b has, 1 where
the two rewards are exactly equal. Half of it is the indicator in the paper's p_hat (section 2).

rewards  float32 or float64 (k, responses), C-contiguous; k from 1 to 1024, inf allowed, no NaN
a, b     int64 or int32 (pairs,), the two responses of each pair, 0 to responses - 1

Raises TypeError and ValueError as pair_statistics does.)");

    module.def("kendall_tau", &kendall_tau, py::arg("scores"), py::arg("path") = "auto", py::arg("threads") = 0,
               R"(kendall_tau(scores, path="auto", threads=0)
--

Kendall's tau-b of every two models' rankings of the continuations, prompt by prompt: float64 (prompts, k, k), each from
-1 to 1. The paper's figure 3 is its mean over prompts.

scores   float32 or float64 (k, prompts, n), C-contiguous; k from 1 to 1024, n below 2^31, inf allowed, no NaN
path     "portable" sorts, O(k^2 n log n) a prompt; "avx2" (n^2 / 16 bytes) and "avx512", where the CPU has them, compare all
         pairs, O(k^2 n^2), but many at a time; "auto" takes what costs least: to compare up to n = 300 or so for k = 2, 500
         for k = 8 with AVX2, and twice that with AVX-512. The result is the same to the last bit
threads  0 to 1024; 0 is as many as pay. The result is the same for any number

Equal scores, inf and inf, and -0.0 and 0.0 are ties. [i, j] with i != j equals scipy.stats.kendalltau(scores[i, prompt],
scores[j, prompt]).statistic in every bit (so [j, i] can differ from it in the last one); the diagonal is 1. A model that
scores all n alike, and n < 2, have nan in their row and column.

Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, a view that is not C-contiguous, and NaN, with
its model (counted from 1), prompt and index.)");

    module.def("bootstrap_sums", &bootstrap_sums, py::arg("sums"), py::arg("resamples"), py::arg("seed"),
               py::arg("path") = "auto", py::arg("threads") = 0,
               R"(bootstrap_sums(sums, resamples, seed, path="auto", threads=0)
--

Sums over as many prompts as there are, drawn with replacement: float64 (resamples, columns). Of the identity matrix they are
how often each prompt is drawn, which no other call needs: counts are never stored.

sums       float64 (prompts, columns), C-contiguous, fewer than 2^31 prompts: of each prompt. A value that is not finite makes
           its column's sums nan, or infinite, also where its prompt is not drawn
resamples  integer from 0 to 2^31 - 1
seed       integer from 0 to 2^64 - 1
path       "auto", "portable" or, where the CPU has it, "avx2" or "avx512": the same result to the last bit
threads    0 to 1024; 0 is as many as pay. The result is the same for any number

The draws are the same on every machine, and resample i is the same however many are asked for: it is drawn by splitmix64
with the state mix(mix(seed) + i), mix being its output function; a prompt is drawn from the upper 32 bits of an output by
Lemire's unbiased method. How often a prompt is drawn times its value is added prompt by prompt, in pieces of 128.

Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, a view that is not C-contiguous, and an integer out
of range.)");
}
