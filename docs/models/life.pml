/* When the CUDA server of a rank runs (csrc/cas_server/life.hpp): launches of the serving kernel that take over, leave it to
 * the one that serves, or end; the engine's thread, which announces a request and makes sure of a server before it waits; the
 * launching thread, which goes by the bells and cannot launch while the engine's thread waits with the driver's lock.
 *
 * The partner is the worst one: it answers this rank's request only after its own has been answered here. So this rank must
 * serve while it waits itself, although nobody can launch then.
 *
 * The device may raise a barrier between two things that are enqueued, as it does when a kernel is loaded: what comes later, the
 * announced request and launches of the server, begins when all that came before has ended. Then the server must give way
 * (G1-G3). While a barrier stands the engine's thread is not inside the driver: both at once end by a bound of time (G3),
 * which has no place here.
 *
 * Holds: at most one launch serves; every request is answered, however often the server ends between and whichever launch is
 * late (no invalid end state).
 */
#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef STREAMS
#define STREAMS 2
#endif
#define FREE 0
#define SERVING 1
#define LEAVING 2
#define OPEN (pushed != consumed)
#define COMING (announced != pushed)
#ifndef MUTATE_NO_WAY_GIVEN
#define OUTSTANDING (OPEN || (COMING && !relieved[_pid]))
#else
#define OUTSTANDING (OPEN || COMING)
#endif
#define NEXT(n) ((n) % 3 + 1)

byte tail, served;                   /* the partner's requests here: pushed (the bells say the same), answered */
byte announced, pushed, consumed;    /* this rank's own: by the host, by its stream, answered */
byte life;
bool running, stop;                  /* words in host memory */
byte queued[STREAMS];                /* the launch in each stream that has not begun; 0: none */
bool busy[STREAMS];                  /* a launch runs there */
byte newest = 1;                     /* launches are numbered 1, 2, 3, 1, ...; not pending: it has begun to look at `life` */
bool pending;
bool wants[STREAMS];                 /* G1: the launch there asks for relief */
bool relieved[STREAMS];              /* G2: it has it */
bool barrier;
byte before[STREAMS];                /* launches there that the barrier waits for */
bool driver;                         /* the lock: the engine's thread is inside */
byte servers, threads = 2, goal = ROUNDS;  /* rounds of the engine; a barrier comes in the last one */

inline begun() { atomic { if :: number == newest -> pending = false :: else fi } }

/* A stream runs its launch at any time: the CTA that decides for all of them, then the control warp. */
active [STREAMS] proctype stream() {
  byte number;
end:
  do
  :: atomic { queued[_pid] != 0 && (!barrier || before[_pid] > 0) ->
       number = queued[_pid]; queued[_pid] = 0; busy[_pid] = true }
#ifndef MUTATE_BEGUN_AFTER_THE_LOOK
     begun();
#endif
     if
     :: life == SERVING ->
#ifdef MUTATE_BEGUN_AFTER_THE_LOOK
        begun();
#endif
        goto gone
#ifdef MUTATE_LEAVING_COUNTS_AS_SERVING
     :: life == LEAVING -> begun(); goto gone
#endif
     :: atomic { life == FREE -> life = SERVING; servers++; assert(servers == 1) }
     fi;
     begun();
     running = true;
     do
     :: atomic { tail > served -> served++ }
     :: atomic { COMING && !OPEN && !wants[_pid] && barrier -> wants[_pid] = true }
     :: stop || (tail == served && !OUTSTANDING) ->    /* ends, if that still holds when all can see that it ends */
        life = LEAVING;
#ifndef MUTATE_RUNNING_TO_THE_END
        running = false;
#endif
#ifndef MUTATE_NO_LAST_LOOK
        if
        :: !stop && (tail > served || OUTSTANDING) -> life = SERVING; running = true
        :: else -> break
        fi
#else
        break
#endif
     od;
     atomic { servers--; life = FREE }
     running = false;
gone:
     atomic { number = 0; busy[_pid] = false; wants[_pid] = false; relieved[_pid] = false; if :: before[_pid] > 0 -> before[_pid]-- :: else fi }
  od
}

inline launch() {
  atomic {
    if
    :: queued[0] == 0 -> newest = NEXT(newest); queued[0] = newest; pending = true
    :: queued[1] == 0 -> newest = NEXT(newest); queued[1] = newest; pending = true
    :: else              /* every stream has a launch that has not begun */
    fi
  }
}

/* G2: behind the launch that asks, unless one is there already. */
inline relieve(s) {
  atomic {
    wants[s] && !relieved[s] && !driver ->
#ifndef MUTATE_RELIEF_NOT_LAUNCHED
    if
    :: queued[s] == 0 -> newest = NEXT(newest); queued[s] = newest; pending = true
    :: else
    fi;
#endif
    relieved[s] = true
  }
}

active proctype engine() {
  byte round;
  do
  :: round == goal -> break
  :: else ->
     round++;
     if
     :: atomic { busy[0] + busy[1] > 0 -> barrier = true; goal = round; before[0] = busy[0] + (queued[0] != 0); before[1] = busy[1] + (queued[1] != 0) }
     :: true
     fi;
#ifndef MUTATE_NOT_ANNOUNCED
     announced++;
#endif
     if
     :: running
     :: !running -> if :: pending :: atomic { !pending -> launch() } fi
     fi;
     atomic { !barrier || before[0] + before[1] == 0 -> barrier = false; driver = true; pushed++ }    /* nobody launches until the answer is there */
     (consumed == round);
     driver = false
  od;
  threads--
}

active proctype partner() {
  byte round;
  do
  :: round == ROUNDS -> break
  :: else ->
     round++;
     tail++;
     (served == round);
     if                          /* answers between its own requests, or not */
     :: pushed > consumed -> consumed++
     :: true
     fi
  od;
  do
  :: consumed == goal -> break
  :: pushed > consumed -> consumed++
  od;
  threads--
}

active proctype launcher() {
  bool late;
  do
  :: threads == 0 -> break
  :: relieve(0)
  :: relieve(1)
  :: atomic { !driver && tail > served && !running && !pending -> launch() }
  :: atomic { !driver && pending && !running && !late -> late = true; launch() }  /* took too long: once more, elsewhere */
  od;
  stop = true
}
