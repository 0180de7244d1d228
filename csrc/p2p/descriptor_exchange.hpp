// Passes one file descriptor of each rank to every other one, over unix sockets without a name in any file system.
//
//   1. every rank listens on an abstract address that the kernel picks; the addresses travel over the control plane
//   2. each connects to each and says hello with the job's token and its rank
//   3. who is asked checks user, token and rank, and answers with the token, its own rank and the descriptor (SCM_RIGHTS)
//
// All ranks do 2 and 3 at once in one loop with one deadline; nothing is left behind, whatever happens to whom.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "deadline.hpp"
#include "p2p/arena_words.hpp"
#include "p2p/shm_segment.hpp"

namespace sidp {

class DescriptorExchange {
 public:
  // Listens from here on. Error where the system refuses.
  DescriptorExchange(int rank, int world_size, JobToken token);

  // What peers need to find this rank: at most kMostAddressBytes bytes, no text.
  const std::string& address() const { return address_; }

  // Collective: gives `fd` to every peer and returns theirs, by rank (an invalid one at this rank's place). Ends the
  // listening. Error naming the ranks that were not heard from within `timeout_s`, or that are another user's.
  std::vector<Descriptor> run(int fd, const std::vector<std::string>& addresses, double timeout_s);

  static constexpr std::size_t kMostAddressBytes = 60;

 private:
  struct Call {
    Descriptor socket;
    int rank = -1;  // who was called, or who calls once it has said so
  };

  std::vector<Call> call_all(const std::vector<std::string>& addresses) const;
  void accept_all(std::vector<Call>& callers) const;
  int answer(const Call& caller, int fd, const std::vector<bool>& served) const;
  Descriptor take_answer(const Call& call) const;

  int rank_;
  int world_size_;
  JobToken token_;
  Descriptor listener_;
  std::string address_;
};

}  // namespace sidp
