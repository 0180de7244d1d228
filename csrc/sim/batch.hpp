// Which requests run, and what the next iteration has to compute: admission by KV tokens in the order of arrival, prompts in
// chunks beside the running answers. A request's whole length is reserved when it is admitted, so nothing is preempted.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "model.hpp"

namespace sidp::sim {

// Rows and attention of one iteration.
struct Work {
  int rows = 0;
  int samples = 0;         // rows that end in a token
  double cached = 0;       // tokens of KV cache read
  double pairs = 0;        // prompt token x earlier token
};

class Batch {
 public:
  Batch(const std::vector<Request>& requests, const Options& options, std::uint64_t kv_tokens)
      : requests_(requests), most_rows_(options.batched_tokens), most_requests_(options.most_requests), kv_tokens_(kv_tokens) {}

  // Takes from the front of `waiting` what has arrived and fits, until `most` run.
  void admit(std::deque<int>& waiting, double now, int most);
  Work compose();
  // The composed iteration is over: appends the requests that ended with it. Returns the tokens answered.
  int advance(std::vector<int>& ended);

  int running() const { return static_cast<int>(running_.size()); }
  std::uint64_t most_reserved() const { return most_reserved_; }

 private:
  struct Running {
    int request = 0;
    int prompt_left = 0;
    int context = 0;
    int answer_left = 0;
    int chunk = 0;  // prompt tokens of the composed iteration; 0: decodes
  };

  const std::vector<Request>& requests_;
  const int most_rows_;
  const int most_requests_;
  const std::uint64_t kv_tokens_;
  std::uint64_t reserved_ = 0, most_reserved_ = 0;
  std::vector<Running> running_;
};

}  // namespace sidp::sim
