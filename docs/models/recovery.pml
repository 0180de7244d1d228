/* How the survivors agree on who is lost (docs/protocol_survival.md): three ranks, one word in memory that outlives every
 * process, set once by compare-and-swap. Ranks die at any moment, at most two of them, and one rank may be given up
 * although it lives (it was stopped for longer than the timeout). Backups are filled during the recovery, as with
 * backup="file", and every survivor fills some.
 *
 * Holds: all who go on agree on the one lost rank; nobody goes on who was given up and has noticed; a backup is read
 * only after it was filled; whoever meets a second loss ends with an error; nobody waits for ever (no invalid end state).
 */
#define D 3
#define DEATHS 2
#define NOBODY 0   /* else rank + 1 */
#define GOING 1
#define FAILED 2
#define EXCLUDED 3

byte verdict;                  /* the word: the lost rank + 1 */
bool alive[D] = true, filled[D], finished[D];
byte outcome[D], lost_of[D];
byte deaths, suspicions;

inline may_die(me) {
  if
  :: deaths < DEATHS -> atomic { deaths++; alive[me] = false; goto end }
  :: true
  fi
}

/* Another rank of whose loss `me` knows: dead, given up by `me` after a timeout, or named by the verdict. */
inline evidence(me, d) {
  d = NOBODY;
  if
  :: verdict != NOBODY -> d = verdict
  :: verdict == NOBODY && !alive[(me + 1) % D] -> d = (me + 1) % D + 1
  :: verdict == NOBODY && !alive[(me + 2) % D] -> d = (me + 2) % D + 1
  :: atomic { suspicions == 0 && !finished[(me + 1) % D] -> suspicions++; d = (me + 1) % D + 1 }
  :: finished[(me + 1) % D] && finished[(me + 2) % D]
  fi
}

inline agree(me, d, seen) {
#ifdef MUTATE_NO_SWAP  /* looks and then writes */
  if
  :: verdict == NOBODY -> may_die(me); verdict = d
  :: else
  fi;
  seen = d
#else
  atomic {
    if
    :: verdict == NOBODY -> verdict = d
    :: else
    fi;
    seen = verdict
  }
#endif
}


proctype rank(byte me) {
  byte d, seen, a, b;
  may_die(me);
  evidence(me, d);
  if
  :: d == NOBODY -> goto done
  :: else
  fi;
  may_die(me);
  agree(me, d, seen);
  if
  :: seen == me + 1 -> outcome[me] = EXCLUDED; goto done
  :: seen != me + 1 && seen != d -> outcome[me] = FAILED; goto done
  :: else
  fi;
  lost_of[me] = seen - 1;
  may_die(me);
  filled[me] = true;
  a = (lost_of[me] + 1) % D;
  b = (lost_of[me] + 2) % D;
#ifndef MUTATE_READ_AT_ONCE
  if
  :: filled[a] && filled[b]
#ifndef MUTATE_NO_SECOND_LOOK
  :: (a != me && !alive[a]) || (b != me && !alive[b]) -> outcome[me] = FAILED; goto done
#endif
  /* A survivor that failed or was told that it is out says so in its phase; it fills nothing any more. */
  :: outcome[a] > GOING || outcome[b] > GOING -> outcome[me] = FAILED; goto done
  fi;
#endif
  assert(filled[a] && filled[b]);
  outcome[me] = GOING;
  assert(verdict == lost_of[me] + 1);
  assert(lost_of[me] != me);
  assert(outcome[a] != GOING || lost_of[a] == lost_of[me]);
  assert(outcome[b] != GOING || lost_of[b] == lost_of[me]);
done:
  finished[me] = true;
end:
  if                           /* also a rank that has died leaves nothing for others to wait for */
  :: !alive[me] -> finished[me] = true
  :: else
  fi
}

init { atomic { run rank(0); run rank(1); run rank(2) } }
