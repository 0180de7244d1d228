/* The mailbox of CaS (docs/protocol_cas.md, "One request" and "The CPU backend"): two requesters, one owner that sleeps
 * on its doorbell. Requester 1 is hostile: once a request is announced it scribbles over the record in its slot.
 *
 * Holds: the owner reads the rows of the request that was announced; rows and results are never overwritten before they
 * were read (R1); a reply belongs to its request; requests of one requester are answered once and in order; what the
 * owner uses was checked (O2); no doorbell is lost: an owner that sleeps without a timeout still serves everything
 * (no invalid end state).
 */
#define SLOTS 2
#ifndef REQUESTS
#define REQUESTS 3
#endif
#define MAX_ROWS 4
#define TOO_MANY 9
#define SLOT(r, n) ((r) * SLOTS + ((n) - 1) % SLOTS)

byte tail[2], record_sequence[4], record_rows[4], rows[4];    /* in the owner's region */
byte reply_sequence[4], reply_of[4], result[4];               /* in the requesters' regions */
bool rung;                                                    /* the bell, since the owner read it last */
bool sleeping, asleep;
byte finished;

proctype requester(byte me; bool hostile) {
  byte pushed, consumed, at;
  do
  :: consumed == REQUESTS -> break
#ifdef MUTATE_NO_R1
  :: pushed < REQUESTS ->
#else
  :: pushed < REQUESTS && pushed + 1 <= consumed + SLOTS ->                   /* R1 */
#endif
     pushed++;
     at = SLOT(me, pushed);
#ifdef MUTATE_TAIL_FIRST
     tail[me] = pushed;
#endif
     if                                                                       /* R1b: early, so that it wakes meanwhile */
     :: sleeping -> rung = true; asleep = false
     :: else
     fi;
     rows[at] = pushed;                                                       /* R2 */
     record_sequence[at] = pushed;                                            /* R3 */
     record_rows[at] = MAX_ROWS;
#ifdef MUTATE_BELL_FIRST
     rung = true;
     if
     :: sleeping -> asleep = false
     :: else
     fi;
     tail[me] = pushed;
#else
     tail[me] = pushed;                                                       /* R4 */
#ifndef MUTATE_NO_LATE_BELL
     rung = true;                                                             /* R4b: due all the same */
     if
     :: sleeping -> asleep = false
     :: else
     fi;
#endif
#endif
     if
     :: hostile -> record_rows[at] = TOO_MANY
     :: !hostile
     fi
  :: consumed < pushed && reply_sequence[SLOT(me, consumed + 1)] == consumed + 1 ->  /* R5 */
     at = SLOT(me, consumed + 1);
     assert(reply_of[at] == consumed + 1);
     assert(result[at] == consumed + 1 || result[at] == 0);                   /* R6; 0: refused */
     assert(hostile || result[at] != 0);
     consumed++                                                               /* R7 */
  od;
  atomic { finished++; rung = true; asleep = false }                               /* close() wakes the server too */
}

byte served[2];

inline serve_one(r) {
  at = SLOT(r, served[r] + 1);
  count = record_rows[at];                                                    /* O2: a copy ... */
  if
  :: record_sequence[at] != served[r] + 1 || count > MAX_ROWS -> answer = 0   /* refused */
  :: else ->
#ifdef MUTATE_CHECK_IN_PLACE
     count = record_rows[at];                                                 /* ... and not the record again */
#endif
     assert(count <= MAX_ROWS);
     answer = rows[at];                                                       /* O4 */
     assert(answer == served[r] + 1)
  fi;
  served[r]++;
#ifdef MUTATE_REPLY_FIRST
  reply_sequence[at] = served[r];
#endif
  result[at] = answer;                                                        /* O5 */
  reply_of[at] = served[r];                                                   /* O6 */
  reply_sequence[at] = served[r]                                              /* O7 */
}

active proctype owner() {
  byte at, count, answer;
  do
  :: tail[0] > served[0] -> assert(tail[0] - served[0] <= SLOTS); serve_one(0)    /* O1, O3 */
  :: tail[1] > served[1] -> assert(tail[1] - served[1] <= SLOTS); serve_one(1)
  :: tail[0] == served[0] && tail[1] == served[1] ->
     if
     :: finished == 2 -> break
     :: else
     fi;
     sleeping = true;
     rung = false;
     if
#ifdef MUTATE_NO_SECOND_LOOK
     :: true ->
#else
     :: tail[0] == served[0] && tail[1] == served[1] && finished < 2 ->           /* looks once more */
#endif
#ifdef MUTATE_BLIND_SLEEP  /* sleeps whatever the bell says */
        asleep = true;
#else
        atomic {                                                              /* futex: compares and sleeps in one */
          if
          :: !rung -> asleep = true
          :: else
          fi
        }
#endif
        !asleep
#ifndef MUTATE_NO_SECOND_LOOK
     :: else
#endif
     fi;
     sleeping = false
  od
}

init { atomic { run requester(0, false); run requester(1, true) } }
