#include "batch.hpp"

#include <algorithm>

namespace sidp::sim {

void Batch::admit(std::deque<int>& waiting, double now, int most) {
  while (!waiting.empty() && running() < std::min(most, most_requests_)) {
    const Request& r = requests_[waiting.front()];
    const auto length = static_cast<std::uint64_t>(r.prompt + r.answer);
    if (r.arrival > now || reserved_ + length > kv_tokens_) return;
    reserved_ += length;
    most_reserved_ = std::max(most_reserved_, reserved_);
    running_.push_back({waiting.front(), r.prompt - r.cached, r.cached, r.answer, 0});
    waiting.pop_front();
  }
}

Work Batch::compose() {
  Work work;
  for (const Running& r : running_)
    if (r.prompt_left == 0) {
      ++work.rows;
      ++work.samples;
      work.cached += r.context;
    }
  int room = most_rows_ - work.rows;
  for (Running& r : running_) {
    r.chunk = std::clamp(r.prompt_left, 0, std::max(0, room));
    if (r.chunk == 0) continue;
    room -= r.chunk;
    work.rows += r.chunk;
    work.cached += r.context;
    work.pairs += r.chunk * (r.context + r.chunk / 2.0);
    if (r.chunk == r.prompt_left) ++work.samples;
  }
  return work;
}

int Batch::advance(std::vector<int>& ended) {
  int tokens = 0;
  for (Running& r : running_) {
    const bool answers = r.prompt_left == r.chunk;  // also the chunk that ends a prompt samples a token
    r.context += r.prompt_left > 0 ? r.chunk : 1;
    r.prompt_left -= r.chunk;
    if (!answers) continue;
    ++tokens;
    if (--r.answer_left > 0) continue;
    reserved_ -= static_cast<std::uint64_t>(requests_[r.request].prompt + requests_[r.request].answer);
    ended.push_back(r.request);
  }
  running_.erase(std::remove_if(running_.begin(), running_.end(), [](const Running& r) { return r.answer_left == 0; }),
                 running_.end());
  return tokens;
}

}  // namespace sidp::sim
