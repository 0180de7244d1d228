/* The life of a ring's slots (docs/protocol.md, "Slots"): one copy thread fills, one user reads, tickets count.
 * Three remote layers in two slots; the window of layers 0 and 1 is fetched in the order 1, 0 (peak shifting). The user
 * asks for the expected layer or, at any time, for another one, which makes the plan anew.
 *
 * Holds: a user reads whole bytes of the layer that it asked for (RAW); nothing is written into a slot in use (WAR); a
 * ready of a dropped ticket satisfies nobody; nothing waits in a circle, and a stop ends both (no invalid end state).
 */
#define N 3
#define S 2
#ifndef USES
#define USES 5
#endif
#define NEVER 255
#define TORN 254
#define SLOT(i) ((i) % S)

byte ready[S], released[S];      /* ticket + 1; one writer each */
byte content[S] = TORN;          /* the copy thread's note of the layer that lies there whole */
byte bytes[S] = TORN;            /* what really lies in the slot */
bool used[S];                    /* a reader is in the slot */
byte epoch;
bool stopped;

/* The plan: every access to it is one atomic step, as under plan_mutex_. */
byte order[N], window_end[N];
byte base_ticket, base_index, forward, position, largest;
byte planned[S] = NEVER, last_use[S] = NEVER;
byte first = NEVER, second = NEVER;  /* what is left of a window that a restart cut into */
byte next_ticket;

inline plan_next(index, ticket, slot, after) {
  if
  :: first != NEVER -> index = first; first = second; second = NEVER
  :: else ->
     if
     :: position == N -> position = 0; forward++
     :: else
     fi;
     index = order[position]; position++
  fi;
  ticket = base_ticket + forward * N + index - base_index;
  slot = SLOT(index);
  after = planned[slot];
  planned[slot] = ticket;
  if
  :: ticket > largest -> largest = ticket
  :: else
  fi
}

inline plan_restart(index) {
#ifdef MUTATE_TICKETS_AGAIN  /* the new plan takes the numbers of the old one again */
  base_ticket = next_ticket;
#else
  base_ticket = largest + 1;
#endif
  base_index = index;
  forward = 0;
  largest = base_ticket;
  forward = 0;
  planned[0] = last_use[0]; planned[1] = last_use[1];
  first = index;
  second = (index == 0 -> 1 : NEVER);
  /* Layer 1 is fetched before layer 0, so a restart at 0 has 1 after it, and a restart at 1 nothing. */
  position = window_end[index];
  next_ticket = base_ticket;
  epoch++
}

proctype copy_thread() {
  byte index, ticket, slot, after, seen;
  do
  :: stopped -> break
  :: else ->
     atomic { plan_next(index, ticket, slot, after); seen = epoch }           /* S1 */
#ifndef MUTATE_NO_WAR
#ifdef MUTATE_STOP_BY_EPOCH  /* a stop that comes between the look at `stopped` and that at the epoch is not seen */
     (after == NEVER || released[slot] > after || epoch != seen);
#else
     (after == NEVER || released[slot] > after || epoch != seen || stopped);  /* S2 */
#endif
#endif
     if
     :: epoch != seen || stopped -> goto dropped
     :: else
     fi;
#ifdef MUTATE_READY_FIRST
     ready[slot] = ticket + 1;
#endif
     if
     :: content[slot] == index
     :: else ->                                                               /* S3 */
        content[slot] = TORN;
        assert(!used[slot]);
        bytes[slot] = TORN;
        if
        :: epoch != seen -> goto dropped
        :: else
        fi;
        assert(!used[slot]);
        bytes[slot] = index;
        if
        :: epoch != seen -> goto dropped
        :: else
        fi;
        content[slot] = index
     fi;
     ready[slot] = ticket + 1;                                                /* S4 */
dropped:
     skip
  od
}

proctype user() {
  byte layer, ticket, slot, uses;
  do
  :: uses == USES -> break
  :: else ->
     select(layer : 0 .. N - 1);
     atomic {
       if
       :: (base_index + next_ticket - base_ticket) % N != layer -> plan_restart(layer)
       :: else
       fi;
       ticket = next_ticket;
       next_ticket++;
       slot = SLOT(layer);
       last_use[slot] = ticket
     }
     (ready[slot] > ticket);                                                  /* S5 */
     used[slot] = true;
     assert(bytes[slot] == layer);                                            /* S6 */
     assert(bytes[slot] == layer);
     used[slot] = false;
     released[slot] = ticket + 1;                                             /* S7 */
     uses++
  od;
  stopped = true;
  epoch++
}

init {
  atomic {
    order[0] = 1; order[1] = 0; order[2] = 2;
    window_end[0] = 2; window_end[1] = 2; window_end[2] = 3;
    run copy_thread();
    run user()
  }
}
