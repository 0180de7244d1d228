/* The hand-over between launches of the CUDA server's kernel (csrc/cas_server/control.cuh): one control warp elects, two
 * CTAs compute, the kernel ends by itself at an idle or a run bound, and the host thread launches it again.
 *
 * Holds: every request is answered exactly once and in order, however often the kernel ends between (no lost request: no
 * invalid end state); a CTA never reads an entry of the board that has been given to another batch; a launch leaves
 * nothing running when it ends, and batch numbers go on in the next.
 */
#define CTAS 2
#ifndef REQUESTS
#define REQUESTS 5
#endif
#ifndef LAUNCHES
#define LAUNCHES 3
#endif
#ifndef SLOTS
#define SLOTS 3
#endif
#define EXIT 255

byte tail, reply;                           /* one requester's tail and the reply's sequence */
bool stop;                                  /* the host's word */

/* ServerState: outlives a launch. */
byte state_served, state_base, exited, launches;
byte board_sequence, completed;
byte board_id[2], board_work[2];            /* the entry's batch number; the request that it holds, or EXIT */
byte progress[2];

byte running;                               /* CTAs of this launch, control included, that have not returned */

active proctype requester() {
  byte sent;
  do
  :: sent == REQUESTS -> break
  :: else -> sent++; (sent <= reply + SLOTS); tail = sent                        /* R1, R4 */
  od;
  (reply == REQUESTS);
  stop = true
}

proctype control(byte base) {
  byte served = state_served, id = base;
  bool over;
#ifdef MUTATE_FROM_TAIL  /* a launch begins with what is new from now on */
  served = tail;
#endif
  do
  :: id++;
#ifndef MUTATE_NO_BOARD_WAIT
     (id < base + 3 || completed >= id - 2);
#endif
     /* Looks around until there is work, or a bound has passed. Only the last launch goes on until it is stopped. */
     if
     :: tail > served -> over = false
     :: stop || launches < LAUNCHES -> over = true
     fi;
     if
     :: !over ->
        served++;
        d_step { board_id[id % 2] = id; board_work[id % 2] = served }
     :: else ->
#ifndef MUTATE_NO_LAST_WAIT
        (id == base + 1 || completed >= id - 1);
#endif
        d_step { board_id[id % 2] = id; board_work[id % 2] = EXIT }
        completed = id;
#ifndef MUTATE_SERVED_NOT_KEPT
        state_served = served;
#endif
     fi;
     board_sequence = id;
     if
     :: over -> break
     :: else
     fi
  od;
  running--
}

proctype cta(byte base) {
  byte id = base, work;
  do
  :: id++;
     (board_sequence >= id);
     assert(board_id[id % 2] == id);
     work = board_work[id % 2];
     if
     :: work == EXIT -> break
     :: else
     fi;
     /* computes; the last one through completes the batch */
     atomic {
       progress[id % 2]++;
       if
       :: progress[id % 2] == CTAS ->
          progress[id % 2] = 0;
          assert(work == reply + 1);
          assert(completed == id - 1 || id == base + 1);
          reply = work;                                                       /* O7 */
          completed = id
       :: else
       fi
     }
  od;
#ifdef MUTATE_FIRST_LEAVES  /* the first CTA to leave hands on, instead of the last */
  if
  :: exited == 0 -> exited = 1; state_base = id - 1
  :: else -> exited = 0
  fi;
#else
  atomic {
    exited++;
    if
    :: exited == CTAS -> exited = 0; state_base = id
    :: else
    fi
  }
#endif
  running--
}

active proctype host() {
  do
  :: launches == LAUNCHES || stop -> break
  :: else ->
     assert(running == 0 && exited == 0);
     atomic {
       launches++;
       running = CTAS + 1;
       run control(state_base); run cta(state_base); run cta(state_base)
     }
     (running == 0)                         /* a stream runs one kernel after the other */
  od
}
