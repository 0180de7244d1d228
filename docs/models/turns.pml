/* Turns at owners (csrc/ffn_cache/cuda_turns.hpp): three readers, each with a few fetches from two owners in a rotated order, so
 * that up to three tickets are drawn at once and some owner is visited twice. One reader may be killed between any two steps, and
 * one may be closed while the others go on: its waits return at once, yet all that it has enqueued runs.
 *
 * The bound of a wait is far above any turn, so that it is reached only after a death. A group that can go on without the
 * lost rank has hosts that set `off` too, sooner or later; one that cannot has none that do.
 *
 * Holds: at an owner whose turns everybody waited for, one reader reads at a time, after a death too; `ended` never passes
 * `taken`; a ticket is ended once, by who drew it, and only the dead leave one open; every live reader gets through all its
 * fetches, and none waits in a circle (no invalid end state).
 */
#define READERS 3
#define OWNERS 2
#ifndef FETCHES
#define FETCHES 3
#endif
#define NOBODY 255
#define OWNER(r, n) (((r) + (n)) % OWNERS)

byte taken[OWNERS], ended[OWNERS];   /* in the owners' arenas */
bool off[READERS];                   /* each reader's turns_off */
byte dead = NOBODY, closed = NOBODY;

byte reading[OWNERS];                /* for the assertions only, like each reader's `open` */
bool bypassed[OWNERS];               /* somebody read there without waiting for its turn to come */

inline begin_turn(o) {
  if
  :: atomic { off[me] -> bypassed[o] = true }
  :: !off[me] ->
#ifdef MUTATE_DRAWN_IN_TWO_STEPS
     ticket = taken[o];
     atomic { taken[o] = ticket + 1; open[o] = true }
#else
     atomic { ticket = taken[o]; taken[o]++; open[o] = true }
#endif
     held[o] = true;
     if
     :: ended[o] >= ticket
     :: atomic {
          closed == me || off[me] ->
          bypassed[o] = true;
#ifdef MUTATE_NOT_ENDED
          held[o] = false
#endif
        }
#ifndef MUTATE_NO_BOUND
     :: atomic { dead != NOBODY -> bypassed[o] = true; off[me] = true }
#endif
     fi
  fi
}

inline end_turn(o) {
  if
#ifndef MUTATE_ENDED_WITHOUT_TICKET
  :: !held[o]
  :: held[o] ->
#else
  :: true ->
#endif
     held[o] = false;
     atomic {
       assert(open[o]);
       open[o] = false;
       ended[o]++;
       assert(ended[o] <= taken[o])
     }
  fi
}

proctype reader(byte me) {
  byte fetch, ticket;
  bool held[OWNERS], open[OWNERS];
  {
#ifdef MUTATE_HOLD_AND_WAIT
    begin_turn(OWNER(me, 0));
#endif
    do
    :: fetch == FETCHES -> break
    :: fetch < FETCHES ->
#ifndef MUTATE_HOLD_AND_WAIT
       begin_turn(OWNER(me, fetch));
#endif
       atomic {
         reading[OWNER(me, fetch)]++;
         assert(reading[OWNER(me, fetch)] == 1 || bypassed[OWNER(me, fetch)])
       }
       reading[OWNER(me, fetch)]--;
#ifdef MUTATE_HOLD_AND_WAIT
       if
       :: fetch + 1 < FETCHES -> begin_turn(OWNER(me, fetch + 1))
       :: else
       fi;
#endif
       end_turn(OWNER(me, fetch));
       fetch++
    od;
    assert(!open[0] && !open[1])
  } unless { dead == me }
}

/* What befalls the readers. It may end at any time, so that nobody can count on it. */
proctype fate() {
  do
  :: atomic { dead == NOBODY -> if :: dead = 0 :: dead = 1 :: dead = 2 fi }
  :: atomic { closed == NOBODY -> if :: closed = 0 :: closed = 1 :: closed = 2 fi }
  :: atomic { dead != NOBODY -> if :: off[0] = true :: off[1] = true :: off[2] = true fi }
  :: break
  od
}

init { atomic { run reader(0); run reader(1); run reader(2); run fate() } }
