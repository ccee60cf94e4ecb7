// What went differently from the best case, and why: Python logs the messages and shows them in device_info().
#pragma once

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

namespace mfa::metal {

class Notes {
 public:
  void add(const std::string& message) {
    const std::lock_guard lock(mutex_);
    if (std::ranges::find(messages_, message) == messages_.end()) messages_.push_back(message);
  }

  std::vector<std::string> messages() const {
    const std::lock_guard lock(mutex_);
    return messages_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> messages_;
};

}  // namespace mfa::metal
