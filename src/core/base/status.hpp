// Status values: the one way a failure leaves a function of the core. Exceptions never cross a thread here.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace elastickv {

enum class Code : std::uint8_t {
    ok = 0,
    unavailable,    // "none now": an ordinary answer; the request may succeed later
    out_of_memory,  // the driver has no memory although a lease was held
    limit,          // the tenant's own limit forbids it
    invalid,        // the caller's argument is wrong
    not_found,      // no such device, library, tenant or file
    exists,         // the name or slot is taken by a live owner
    denied,         // owner, mode or permission
    corrupt,        // a file's contents are not what this version writes
    timeout,        // a deadline passed; the text says for what
    driver,         // any other failure of a driver call
    integrity,      // our own books do not add up: a bug
};

const char *code_name(Code code) noexcept;

// A code and a text for people: what was tried, the value, what to do. Cheap when ok (no text).
class [[nodiscard]] Status {
  public:
    Status() noexcept = default;
    Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

    static Status success() noexcept { return {}; }
    bool ok() const noexcept { return code_ == Code::ok; }
    Code code() const noexcept { return code_; }
    const std::string &message() const noexcept { return message_; }

  private:
    Code code_ = Code::ok;
    std::string message_;
};

// A value or a Status that is not ok.
template <class T> class [[nodiscard]] Result {
  public:
    Result(T value) : value_(std::move(value)) {}          // NOLINT(google-explicit-constructor)
    Result(Status status) : status_(std::move(status)) {}  // NOLINT(google-explicit-constructor)

    bool ok() const noexcept { return value_.has_value(); }
    const Status &status() const noexcept { return status_; }
    T &value() & { return *value_; }
    const T &value() const & { return *value_; }
    T &&value() && { return std::move(*value_); }
    T &operator*() & { return *value_; }
    T *operator->() { return &*value_; }

  private:
    std::optional<T> value_;
    Status status_;
};

}  // namespace elastickv
