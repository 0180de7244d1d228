/* Turns at owners (csrc/ffn_cache/cuda_turns.hpp): three readers, each with a few fetches from two owners in a rotated order, so
 * that up to three wait at one owner and come back to it. One reader may be killed at any moment, and one may be closed while the
 * others go on: its waits return at once, yet what it has enqueued still runs.
 *
 * The bound of a wait is far above any turn: it is reached only after a death. The host of a survivor may say at any time after
 * a death that its reader takes no more turns, but nobody can count on it: not every group goes on without a rank.
 *
 * Holds: at an owner where all have waited for their turns, one reader reads at a time, after a death too; `ended` never passes
 * `taken`; a ticket is ended once, by who drew it, and only the dead leave one open; every live reader gets through all its
 * fetches, and nobody waits in a circle (no invalid end state).
 */
#define READERS 3
#define OWNERS 2
#ifndef FETCHES
#define FETCHES 3
#endif
#define NOBODY 255
#define OWNER(n) ((me + (n)) % OWNERS)

byte taken[OWNERS], ended[OWNERS];
bool off[READERS];                   /* turns_off; nobody else looks, so the host's word is set where its reader meets it */
byte doomed = NOBODY, closed = NOBODY;
bool died;

/* What only the assertions look at. */
byte reading[OWNERS];                /* from the moment a reader may read to the one at which it says that it has */
bool bypassed[OWNERS];               /* somebody read there whose turn had not come */

inline admit(o) {
  ticket = 0;
  reading[o]++;
  assert(reading[o] == 1 || bypassed[o])
}

inline bypass(o) { bypassed[o] = true; admit(o) }

/* Where it shows: with no ticket, with one, and in the turn. Others cannot tell the steps between apart. */
inline may_die() { atomic { doomed == me -> died = true; goto gone } }

inline draw(o) {
#ifdef MUTATE_DRAWN_IN_TWO_STEPS
  ticket = taken[o];
  atomic { taken[o] = ticket + 1; held[o] = true; open[o] = true }
#else
  atomic { ticket = taken[o]; taken[o]++; held[o] = true; open[o] = true }
#endif
}

inline begin_turn(o) {
  if
  :: may_die()
  :: atomic { died -> off[me] = true; bypass(o) }               /* the host's word */
  :: !off[me] ->
     draw(o);
     if
     :: may_die()
     :: atomic { ended[o] >= ticket -> admit(o) }
#ifdef MUTATE_GAVE_UP_WITHOUT_END
     :: atomic { closed == me -> held[o] = false; bypass(o) }
#else
     :: atomic { closed == me -> bypass(o) }
#endif
#ifndef MUTATE_NO_BOUND
     :: atomic { died -> off[me] = true; bypass(o) }            /* the bound, or the host's word */
#endif
     fi
  fi
}

inline end_turn(o) {
  if
  :: may_die()
  :: atomic {
#ifndef MUTATE_END_BEFORE_THE_COPY
       reading[o]--;
#endif
       if
#ifdef MUTATE_END_WITHOUT_TICKET
       :: true ->
#else
       :: !held[o]
       :: held[o] ->
#endif
          held[o] = false;
          assert(open[o]);
          open[o] = false;
          ended[o]++;
          assert(ended[o] <= taken[o])
       fi
     }
  fi;
#ifdef MUTATE_END_BEFORE_THE_COPY
  reading[o]--
#endif
}

proctype reader(byte me) {
  byte fetch, ticket;
  bool held[OWNERS];                 /* the words of that name */
  bool open[OWNERS];                 /* for the assertions: a ticket of this reader is not ended */
#ifdef MUTATE_HOLD_AND_WAIT
  begin_turn(OWNER(0));
  do
  :: fetch + 1 == FETCHES -> end_turn(OWNER(fetch)); break
  :: fetch + 1 < FETCHES -> begin_turn(OWNER(fetch + 1)); end_turn(OWNER(fetch)); fetch++
  od;
#else
  do
  :: fetch == FETCHES -> break
  :: fetch < FETCHES -> begin_turn(OWNER(fetch)); end_turn(OWNER(fetch)); fetch++
  od;
#endif
  assert(!open[0] && !open[1]);
gone:
  skip
}

init {
  atomic {
    if :: doomed = NOBODY :: doomed = 0 :: doomed = 1 :: doomed = 2 fi;
    if :: closed = NOBODY :: closed = 0 :: closed = 1 :: closed = 2 fi;
    run reader(0); run reader(1); run reader(2)
  }
}
