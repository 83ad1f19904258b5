// A test harness of forty lines: the registries that packages come from hold none that needs no other build.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Case {
    std::string name;
    std::function<void()> body;
};
inline std::vector<Case> &cases() {
    static std::vector<Case> all;
    return all;
}
struct Register {
    Register(const char *name, std::function<void()> body) { cases().push_back({name, std::move(body)}); }
};
struct Failure {
    std::string text;
};
// Text of a value; lists by their members.
template <class T> std::string show(const T &value) {
    std::ostringstream out;
    if constexpr (requires { out << value; }) {
        out << value;
    } else {
        for (const auto &member : value) out << member << ' ';
    }
    return out.str();
}
[[noreturn]] inline void fail(const char *file, int line, const std::string &text) {
    std::ostringstream out;
    out << file << ':' << line << ": " << text;
    throw Failure{out.str()};
}

}  // namespace check

#define EKV_JOIN2(a, b) a##b
#define EKV_JOIN(a, b) EKV_JOIN2(a, b)
// TEST("driver: reserve gives addresses") { ... }
#define TEST(name)                                                                                    \
    static void EKV_JOIN(test_body_, __LINE__)();                                                     \
    static const check::Register EKV_JOIN(test_reg_, __LINE__)(name, EKV_JOIN(test_body_, __LINE__)); \
    static void EKV_JOIN(test_body_, __LINE__)()
#define CHECK(...)                                                                      \
    do {                                                                                \
        if (!(__VA_ARGS__)) check::fail(__FILE__, __LINE__, "not true: " #__VA_ARGS__); \
    } while (false)
#define CHECK_EQ(a, b)                                                                                       \
    do {                                                                                                     \
        const auto check_left = (a);                                                                         \
        const auto check_right = (b);                                                                        \
        if (!(check_left == check_right)) {                                                                  \
            std::ostringstream check_out;                                                                    \
            check_out << #a " == " #b ": " << check::show(check_left) << " != " << check::show(check_right); \
            check::fail(__FILE__, __LINE__, check_out.str());                                                \
        }                                                                                                    \
    } while (false)
#define CHECK_OK(expr)                                                                                                \
    do {                                                                                                              \
        const auto &check_status = (expr);                                                                            \
        if (!check_status.ok()) check::fail(__FILE__, __LINE__, std::string(#expr ": ") + check::text(check_status)); \
    } while (false)

namespace check {
template <class S> std::string text(const S &s) {
    if constexpr (requires { s.message(); })
        return s.message();
    else
        return s.status().message();
}
}  // namespace check
